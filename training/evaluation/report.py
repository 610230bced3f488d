"""The evaluation report: one HTML file with everything inside, readable without a network or a server."""

from __future__ import annotations

import base64
import html
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tasks.base import Chart
from tasks.charts import COLOURS, DARK, GRID, HALF, MUTED, TEXT, percent, style, thousands
from training.checkpoints import json_text
from training.evaluation import curves
from training.evaluation.curves import Curve
from training.run import rows

CURVE_TITLES = {
    "loss": "Loss",
    "top1": "Top-1 accuracy",
    "learning_rate": "Learning rate",
}
PER_SECOND = "_per_second"
LIGHT = {"back": "#ffffff", "text": TEXT, "muted": "#56626e", "line": GRID, "shade": "#f2f6fb"}
DARK_PAGE = {"back": "#14191e", "text": DARK[TEXT], "muted": DARK[MUTED], "line": DARK[GRID], "shade": "#1b2835"}
SERIES = {**{colour: DARK[colour] for colour in COLOURS}, "#a87900": "#d9b13b", "#0e7c86": "#4fc3cc"}
SERIES |= {"#ad2a5b": "#ee7fa8", "#66727f": "#9aa7b3"}
"""Colours of the series of a curve, on a light page and on a dark one."""
CSS = """
:root { color: var(--text); background: var(--back); color-scheme: light dark;
  font: 15px/1.5 system-ui, "Helvetica Neue", Arial, sans-serif; }
body { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
@media (max-width: 600px) { body { padding: 16px 12px 40px; } }
h1 { font-size: 26px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 44px 0 12px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 16px; margin: 0 0 2px; }
p { margin: 0 0 10px; }
.muted, figcaption { color: var(--muted); font-size: 13.5px; }
.grid { display: flex; flex-wrap: wrap; gap: 28px 32px; align-items: flex-start; }
figure { margin: 0; max-width: 100%; }
figcaption { margin-bottom: 8px; max-width: 72ch; }
img { display: block; max-width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
th, td { padding: 5px 14px 5px 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; padding: 5px 0 5px 22px; }
th { font-weight: 600; }
tr.changed td { background: var(--shade); }
code { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.beside td:not(.number) { overflow-wrap: anywhere; min-width: 9em; max-width: 30em; padding-right: 22px; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; margin: 12px 0; font-size: 14px; }
@media (max-width: 600px) { .facts { grid-template-columns: 1fr; } .facts dd { margin-bottom: 6px; } }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
"""


def _variables(names: Mapping[str, str]) -> str:
    return "".join(f"--{name}: {value}; " for name, value in names.items())


def _stylesheet() -> str:
    light = LIGHT | {f"series{place}": colour for place, colour in enumerate(SERIES)}
    dark = DARK_PAGE | {f"series{place}": colour for place, colour in enumerate(SERIES.values())}
    at_night = f"@media (prefers-color-scheme: dark) {{ :root {{ {_variables(dark)}}} }}"
    return f":root {{ {_variables(light)}}}\n{at_night}\n{CSS}{curves.CSS}"


def read_history(path: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`; none if there is no such file. Lines that are damaged or cut off are left out."""
    return rows.read(path)[0]


def render(
    title: str,
    facts: Mapping[str, str],
    results: Mapping[str, Mapping[str, float]],
    charts: Mapping[str, Sequence[Chart]],
    curves: Sequence[Chart],
    config: Mapping[str, Any],
    defaults: Mapping[str, Any],
    left_out: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """The report as the text of one HTML file.

    Args:
      title: heading.
      facts: where the numbers come from, such as step and weights.
      results: numbers of each set, by name.
      charts: pictures of each set.
      curves: pictures of the training.
      config, defaults: values by dotted key; those that differ from their default are marked.
      left_out: of each set with examples that could not be used, the first reasons.
    """
    sections = [f"<h1>{_text(title)}</h1>", _facts(facts), "<h2>Results</h2>", _table(results)]
    sections += [_left_out(label, reasons) for label, reasons in (left_out or {}).items()]
    if curves:
        sections += ["<h2>Training</h2>", gallery(curves)]
    for label, pictures in charts.items():
        if pictures:
            sections += [f"<h2>Set: {_text(label)}</h2>", gallery(pictures)]
    sections.append(_config_table(config, defaults))
    return page(title, sections)


def page(title: str, sections: Sequence[str]) -> str:
    """An HTML file of its own from pieces of HTML, in the colours that its reader prefers, with curves that move."""
    body = "\n".join(sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_stylesheet()}</style></head>\n'
        f"<body>\n{body}\n<script>{curves.SCRIPT}</script></body></html>\n"
    )


def training_curves(history: Sequence[Mapping[str, Any]], best_metric: str, unit: str) -> list[Curve]:
    """Loss, the metric that chooses checkpoints, learning rate and speed (`unit` in a second) by step, as far as they
    were logged.
    """
    kinds = sorted({row["kind"] for row in history}, key=lambda kind: (kind != "train", kind))
    panels = {
        "loss": ("loss", kinds),
        best_metric: (best_metric, kinds),
        "learning_rate": ("learning rate", ["train"]),
        f"{unit}_per_second": (f"{unit} / s", ["train"]),
    }
    charts = []
    for name, (label, wanted) in panels.items():
        series = {kind.removeprefix("eval/"): points(history, kind, name) for kind in wanted}
        series = {kind: points for kind, points in series.items() if points}
        if series:
            charts.append(curve(name, label, series))
    return charts


def points(history: Sequence[Mapping[str, Any]], kind: str, name: str) -> list[tuple[int, float]]:
    """Steps and values of a name in the rows of a kind."""
    return [(row["step"], row[name]) for row in history if row["kind"] == kind and row.get(name) is not None]


def curve(name: str, label: str, series: Mapping[str, curves.Points]) -> Curve:
    """A result by step, one line for each name of the series."""
    with style():
        figure = Figure(figsize=(HALF, 3.1), layout="constrained")
        axes = figure.add_subplot()
        for colour, (kind, points) in zip(itertools.cycle(SERIES), series.items(), strict=False):
            steps, values = zip(*points, strict=True)
            marker = "o" if kind != "train" or len(points) == 1 else None
            axes.plot(steps, values, color=colour, marker=marker, markersize=4, linewidth=1.6, label=kind)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.xaxis.set_major_formatter(thousands)
        _scale(axes, name, [value for points in series.values() for _, value in points])
        if len(series) > 1:
            axes.legend(fontsize=8.5)
    return Curve(
        "Speed of training" if name.endswith(PER_SECOND) else CURVE_TITLES.get(name, name),
        "",
        figure,
        label,
        series,
        log=axes.get_yscale() == "log",
        zero=name == "learning_rate" or name.endswith(PER_SECOND),
        percent=name.startswith("top"),
    )


def _scale(axes: Axes, name: str, values: Sequence[float]) -> None:
    if name == "loss" and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif name == "learning_rate" or name.endswith(PER_SECOND):
        axes.set_ylim(0, 1.06 * max(values) or 1)
    if name.endswith(PER_SECOND):
        axes.yaxis.set_major_formatter(thousands)
    if name.startswith("top"):
        axes.yaxis.set_major_formatter(percent)


def gallery(charts: Sequence[Chart]) -> str:
    """Charts beside and below each other, as HTML."""
    return '<div class="grid">' + "\n".join(map(_figure, charts)) + "</div>"


def _figure(chart: Chart) -> str:
    if isinstance(chart, Curve):
        return curves.figure(chart, _picture(chart))
    caption = f"<figcaption>{_text(chart.caption)}</figcaption>" if chart.caption else ""
    return f'<figure style="width: {_width(chart)}px"><h3>{_text(chart.title)}</h3>{caption}{_picture(chart)}</figure>'


def _width(chart: Chart) -> int:
    return round(chart.figure.get_figwidth() * 96)


def _picture(chart: Chart) -> str:
    """A figure as an SVG file inside the page, so that the identifiers in it cannot clash with those of another."""
    target = io.BytesIO()
    with style():
        chart.figure.savefig(target, format="svg", dpi=160, transparent=True, metadata={"Date": None})
    content = base64.b64encode(at_night(target.getvalue().decode()).encode()).decode()
    return f'<img alt="{_text(chart.title)}" width="{_width(chart)}" src="data:image/svg+xml;base64,{content}">'


def at_night(svg: str) -> str:
    """The text of an SVG file whose colours are those of `tasks.charts.DARK` where its reader prefers a dark page."""
    names = {colour: f"--c{place}" for place, colour in enumerate(DARK)}
    rules = "".join(f"{name}: {DARK[colour]}; " for colour, name in names.items())
    found = re.sub("|".join(DARK), lambda match: f"var({names[match[0]]}, {match[0]})", svg)
    head, opening, rest = found.partition("<defs>")
    return f"{head}<style>@media (prefers-color-scheme: dark) {{ svg {{ {rules}}} }}</style>{opening}{rest}"


def _table(results: Mapping[str, Mapping[str, float]]) -> str:
    """One line per result, one column per set."""
    names = list(dict.fromkeys(name for values in results.values() for name in values))
    head = "".join(f'<th class="number">{_text(label)}</th>' for label in results)
    lines = []
    for name in names:
        cells = "".join(f'<td class="number">{number(values.get(name))}</td>' for values in results.values())
        lines.append(f"<tr><td>{_text(name)}</td>{cells}</tr>")
    note = '<p class="muted">Accuracies and calibration errors are fractions, losses are in nats.</p>'
    return f'<div class="scroll"><table><tr><th></th>{head}</tr>{"".join(lines)}</table></div>{note}'


def _left_out(label: str, reasons: Sequence[str]) -> str:
    lines = "".join(f"<li>{_text(reason)}</li>" for reason in reasons)
    return (
        f"<p>Left out of {_text(label)}, as config.data.on_error=replace says, were examples that could not be used; "
        f"the first of them:</p><ul>{lines}</ul>"
    )


def number(value: float | None) -> str:
    """A result for people: four decimals, or fewer digits for large numbers; counts as they are."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"


def _config_table(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    lines = []
    for key, value in config.items():
        mark = ' class="changed"' if key in defaults and defaults[key] != value else ""
        lines.append(
            f"<tr{mark}><td><code>{_text(key)}</code></td><td><code>{_text(json_text.text(value))}</code></td></tr>"
        )
    return (
        "<h2>Configuration</h2><p class=muted>Shaded: another value than the default in configs/base.py.</p>"
        f'<div class="scroll"><table>{"".join(lines)}</table></div>'
    )


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items())
    return f'<dl class="facts">{rows}</dl>'


def _text(value: Any) -> str:
    return html.escape(str(value))
