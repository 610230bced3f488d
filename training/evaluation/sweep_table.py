"""What came out of a sweep: a table on the terminal and as `sweep.csv`, and a picture, `sweep.png`.

Everything is read from the folders of the runs, so that it can be made at any time, also while they run.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

import configs
import tasks
from tasks.charts import COLOURS, HALF, percent, shorten, style, thousands
from training.evaluation import report
from training.evaluation.results import aligned, write_text
from training.run import summary, sweep
from training.run.terminal import format_time

SEED = "seed"
MOST_PANELS = 3
LOG_FROM = 8  # times the least value
MOST_LINES_NAMED = 8


@dataclasses.dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
      values: what was swept, by key, as typed.
      curve: `(step, value)` of the best metric on the first evaluation set.
      metrics: of the last evaluation, by `set/metric`; empty unless complete.
      seconds: of all attempts; None unless complete.
    """

    name: str
    values: Mapping[str, str]
    state: str
    step: int | None
    curve: Sequence[tuple[int, float]]
    metrics: Mapping[str, Any]
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class Table:
    """All runs of a sweep, and the metric by which they are compared."""

    rows: Sequence[Row]
    metric: str
    mode: Literal["max", "min"]
    columns: Sequence[str]

    def best_of(self, row: Row) -> tuple[int, float] | None:
        """Step and value of the best evaluation of a run."""
        sign = 1 if self.mode == "max" else -1
        return max(row.curve, key=lambda point: sign * point[1], default=None)

    def best(self) -> Row | None:
        """The run with the best evaluation of all."""
        sign = 1 if self.mode == "max" else -1
        known = [(sign * found[1], -place) for place, row in enumerate(self.rows) if (found := self.best_of(row))]
        return self.rows[-max(known)[1]] if known else None


def read(folder: Path, failed: Mapping[str, tuple[int, str]] | None = None) -> Table:
    """Reads the runs of the sweep in a folder.

    Args:
      failed: those of which this is known, by name.

    Raises:
      ValueError, FileNotFoundError: there is no sweep.
    """
    found = sweep.read(folder)
    of_first = next(iter(found["runs"].values()))
    task = tasks.find(configs.load(found["config"], {**found["overrides"], **of_first}).task.name)
    rows = [
        _row(folder / name, values, task.best_metric[0], name in (failed or {}))
        for name, values in found["runs"].items()
    ]
    return Table(rows, *task.best_metric, task.columns)


def _row(where: Path, values: Mapping[str, str], metric: str, failed: bool) -> Row:
    history = report.read_history(where / "metrics.jsonl")
    first = next((row["kind"] for row in history if row["kind"].startswith("eval/")), None)
    curve = [(row["step"], row[metric]) for row in history if row["kind"] == first and row.get(metric) is not None]
    done = summary.completed(where)
    if done is None:
        step = history[-1]["step"] if history else None
        state = "failed" if failed else "unfinished" if history else "not begun"
        return Row(where.name, values, state, step, curve, {}, None)
    metrics = {f"{label}/{name}": value for label, found in done["metrics"].items() for name, value in found.items()}
    seconds = sum(done.get("goodput", {}).get("seconds", {}).values()) or done.get("seconds")
    return Row(where.name, values, "failed" if failed else "complete", done["step"], curve, metrics, seconds)


def write(folder: Path, failed: Mapping[str, tuple[int, str]] | None = None) -> list[str]:
    """Writes `sweep.csv` and `sweep.png` into the folder of a sweep.

    Returns:
      Lines for the terminal: the table, the best run, what failed, and the files.
    """
    table = read(folder, failed)
    lines = terminal(table).splitlines()
    if (best := table.best()) is not None:
        step, value = table.best_of(best) or (0, 0.0)
        lines.append(f"best: {best.name} ({table.metric} {report.number(value)} at step {step})")
    lines += [f"failed: {name}: {error or f'exit code {code}'}" for name, (code, error) in (failed or {}).items()]
    lines.append(str(write_text(folder / "sweep.csv", as_csv(table))))
    if best is not None:
        with style():
            figure(table).savefig(folder / "sweep.png", dpi=160)
        lines.append(str(folder / "sweep.png"))
    return lines


def terminal(table: Table) -> str:
    """One line for each run: what was swept, the best metric and its step, the last results of the first set, time."""
    keys, labels = _keys(table), {name.partition("/")[0] for row in table.rows for name in row.metrics}
    of_first = next((name.partition("/")[0] for row in table.rows for name in row.metrics), "")
    chosen = [
        f"{of_first}/{name}" for name in table.columns if any(f"{of_first}/{name}" in r.metrics for r in table.rows)
    ]
    if not chosen:
        chosen = list(dict.fromkeys(name for row in table.rows for name in row.metrics))
    chosen = chosen[:4]
    short = [name if len(labels) > 1 else name.removeprefix(f"{of_first}/") for name in chosen]
    head = [*(key.rpartition(".")[2] for key in keys), f"best {table.metric}", "at step", *short, "time", "state"]
    lines = []
    for row in table.rows:
        best = table.best_of(row)
        lines.append(
            [
                *(row.values.get(key, "–") for key in keys),
                *((report.number(best[1]), f"{best[0]:,}") if best else ("–", "–")),
                *(report.number(row.metrics.get(name)) for name in chosen),
                "–" if row.seconds is None else format_time(row.seconds),
                row.state
                if row.state in ("complete", "not begun") or row.step is None
                else f"{row.state} at {row.step:,}",
            ]
        )
    return aligned([head, *lines])


def as_csv(table: Table) -> str:
    """Everything that is known of each run, one line each."""
    names = list(dict.fromkeys(name for row in table.rows for name in row.metrics))
    keys = _keys(table)
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(["run", *keys, "state", "step", f"best_{table.metric}", "best_step", *names, "seconds"])
    for row in table.rows:
        step, best = table.best_of(row) or (None, None)
        results = [row.metrics.get(name) for name in names]
        line = [
            row.name,
            *(row.values.get(key) for key in keys),
            row.state,
            row.step,
            best,
            step,
            *results,
            row.seconds,
        ]
        writer.writerow(["" if cell is None else cell for cell in line])
    return target.getvalue()


def figure(table: Table) -> Figure:
    """The best metric over each swept key, and the learning curves; seeds are points around the mean."""
    keys = [key for key in _keys(table) if key != SEED] or _keys(table)
    panels = keys[:MOST_PANELS] if len(keys) != 2 else keys[:1]
    by = keys[1] if len(keys) == 2 else None
    drawn = Figure(figsize=(HALF * (len(panels) + 1), 3.6), layout="constrained")
    axes = drawn.subplots(1, len(panels) + 1, squeeze=False)[0]
    for key, panel in zip(panels, axes, strict=False):
        _over_values(panel, table, key, by)
    _curves(axes[-1], table, by or keys[0])
    for panel in axes:
        panel.set_ylabel(table.metric)
        if table.metric.startswith("top") or table.metric == "accuracy":
            panel.yaxis.set_major_formatter(percent)
    return drawn


def _over_values(panel: Axes, table: Table, key: str, by: str | None) -> None:
    rows = [(row, best[1]) for row in table.rows if (best := table.best_of(row)) and key in row.values]
    texts = _ordered({row.values[key] for row, _ in rows})
    numbers = _numbers(texts)
    places = dict(zip(texts, numbers or range(len(texts)), strict=True))
    groups = _ordered({row.values.get(by, "") for row, _ in rows}) if by else [""]
    for colour, group in zip(_colours(len(groups)), groups, strict=True):
        chosen = [(row, value) for row, value in rows if not by or row.values.get(by, "") == group]
        means = {
            text: np.mean([value for row, value in chosen if row.values[key] == text])
            for text in texts
            if any(row.values[key] == text for row, _ in chosen)
        }
        panel.plot(
            [places[t] for t in means], list(means.values()), color=colour, linewidth=1.6, label=_label(by, group)
        )
        x, y = [places[row.values[key]] for row, _ in chosen], [value for _, value in chosen]
        panel.plot(x, y, "o", color=colour, markersize=5, clip_on=False, alpha=0.55 if len(means) < len(x) else 1)
    panel.set_xlabel(key)
    if numbers and min(numbers) > 0 and max(numbers) >= LOG_FROM * min(numbers):
        panel.set_xscale("log")
        panel.xaxis.set_minor_locator(NullLocator())
    if len(texts) <= MOST_LINES_NAMED:
        panel.set_xticks([places[text] for text in texts], [shorten(text, 14) for text in texts])
    if by:
        panel.legend(fontsize=8.5)
    panel.set_title("best of each run" + (", line: mean" if len(rows) > len(texts) * len(groups) else ""), fontsize=9.5)


def _curves(panel: Axes, table: Table, key: str) -> None:
    groups = _ordered({row.values[key] for row in table.rows if row.curve and key in row.values})
    colours = dict(zip(groups, _colours(len(groups)), strict=True))
    named = set()
    for row in table.rows:
        if not row.curve or key not in row.values:
            continue
        group = row.values[key]
        steps, values = zip(*row.curve, strict=True)
        label = None if group in named or len(groups) > MOST_LINES_NAMED else _label(key, group)
        named.add(group)
        marker = "o" if len(steps) == 1 else None
        panel.plot(
            steps, values, color=colours[group], marker=marker, markersize=4, linewidth=1.4, label=label, alpha=0.85
        )
    panel.set_xlabel("step")
    panel.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    panel.xaxis.set_major_formatter(thousands)
    panel.set_title("learning curves", fontsize=9.5)
    if len(groups) <= MOST_LINES_NAMED:
        panel.legend(fontsize=8.5)


def _colours(count: int) -> list[Any]:
    """As many as are needed: those of the report, or for more a scale from dark to light."""
    scale = matplotlib.colormaps["viridis"]
    return list(COLOURS[:count]) if count <= len(COLOURS) else [scale(0.9 * i / (count - 1)) for i in range(count)]


def _keys(table: Table) -> list[str]:
    return list(dict.fromkeys(key for row in table.rows for key in row.values))


def _label(key: str | None, value: str) -> str:
    return f"{key.rpartition('.')[2]} {shorten(value, 18)}" if key else value


def _ordered(texts: set[str]) -> list[str]:
    """By number, if all are numbers."""
    return sorted(texts, key=float) if _numbers(list(texts)) else sorted(texts)


def _numbers(texts: Sequence[str]) -> list[float]:
    try:
        return [float(text) for text in texts]
    except ValueError:
        return []
