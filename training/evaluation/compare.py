"""Runs side by side, from the results that their evaluations stored: nothing is evaluated again."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import naming
from training.checkpoints import json_text
from training.evaluation import report, results
from training.run.evaluate import scalars

FILE = "compare.html"


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What is stored of a run.

    Attributes:
      name: as it was given.
      folder: of its results.
      sets: the content of `<set>.json` by set.
      history: rows of its training, if there are any.
    """

    name: str
    folder: Path
    sets: Mapping[str, Mapping[str, Any]]
    history: Sequence[Mapping[str, Any]]

    @property
    def about(self) -> Mapping[str, Any]:
        """What all of its results say of their origin."""
        return next(iter(self.sets.values()))


def read(names: Sequence[str]) -> list[Evaluated]:
    """The stored results of working directories, or of folders that `eval.py --output` wrote.

    Raises:
      FileNotFoundError: no such folder; the line names the nearest.
      ValueError: fewer than two, one of them twice, or one that was not evaluated.
    """
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"--compare={','.join(names)}: takes two or more different folders, such as runs/a,runs/b")
    return [_read(name) for name in names]


def _read(name: str) -> Evaluated:
    place = Path(name)
    if not place.is_dir():
        raise FileNotFoundError(f"--compare: no folder {place}{naming.beside(place)}")
    folder = place / "eval" if (place / "eval").is_dir() else place
    sets = {}
    for file in sorted(folder.glob("*.json")):
        try:
            content = json_text.read(file)
            if isinstance(content["results"], dict):
                sets[str(content["set"])] = content
        except (ValueError, KeyError, OSError):
            continue  # some other file
    if not sets:
        raise ValueError(f"--compare: {place} has no results; evaluate it first (eval.py --workdir={place})")
    return Evaluated(name, folder, sets, report.read_history(folder.parent / "metrics.jsonl"))


def table(runs: Sequence[Evaluated]) -> str:
    """The numbers of each set for a terminal: a line for each, a column for each run."""
    parts = []
    for label, lines in _numbers(runs).items():
        rows = [[label, *(run.name for run in runs), *_head(runs)]]
        rows += [[name, *map(report.number, values), *_difference(values)] for name, values in lines.items()]
        parts.append(results.aligned(rows))
    return "\n\n".join(parts)


def render(runs: Sequence[Evaluated]) -> str:
    """The same as one HTML file, with where the numbers come from, curves over each other, and what differs in the
    configurations.
    """
    names = [run.name for run in runs]
    title = " beside ".join(names)
    said = [results.said(run.about) for run in runs]
    keys = list(dict.fromkeys(key for one in said for key in one))
    sections = [f"<h1>{html.escape(title)}</h1>"]
    sections.append(_table(["", *names], [[key, *(one.get(key, "–") for one in said)] for key in keys]))
    for label, lines in _numbers(runs).items():
        rows = [[name, *map(report.number, values), *_difference(values)] for name, values in lines.items()]
        sections += [f"<h2>Set: {html.escape(label)}</h2>", _table(["", *names, *_head(runs)], rows, numbers=True)]
    if drawn := _curves(runs):
        sections += ["<h2>Training</h2>", report.gallery(drawn)]
    configs = [run.about.get("config", {}) for run in runs]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    rows = [[key, *(json_text.text(config[key]) if key in config else "–" for config in configs)] for key in keys]
    different = [row for row in rows if len(set(row[1:])) > 1]
    note = "" if different else '<p class="muted">No value differs.</p>'
    sections += ["<h2>Configuration: what differs</h2>", note, _table(["", *names], different) if different else ""]
    return report.page(title, sections)


def write(runs: Sequence[Evaluated], folder: Path) -> Path:
    """Writes the page to a folder, and returns its file.

    Raises:
      OSError: the folder cannot be written.
    """
    return results.write_text(folder / FILE, render(runs))


def _numbers(runs: Sequence[Evaluated]) -> dict[str, dict[str, list[float | None]]]:
    """Values by set and name, one for each run."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for label in dict.fromkeys(label for run in runs for label in run.sets):
        values = [scalars(run.sets[label]["results"]) if label in run.sets else {} for run in runs]
        names = dict.fromkeys(name for one in values for name in one)
        found[label] = {name: [one.get(name) for one in values] for name in names}
    return found


def _head(runs: Sequence[Evaluated]) -> list[str]:
    return ["difference"] if len(runs) == 2 else []


def _difference(values: Sequence[float | None]) -> list[str]:
    """Of two runs, the second less the first."""
    if len(values) != 2:
        return []
    first, second = values
    return ["–" if first is None or second is None else f"{second - first:+.4f}"]


def _curves(runs: Sequence[Evaluated]) -> list[report.Curve]:
    """What training and evaluation both measure, the learning rate and the speed; a line for each run."""
    rows = [row for run in runs for row in run.history]
    kinds = [{key for row in rows if (row.get("kind") == "train") is train for key in row} for train in (True, False)]
    both = sorted((kinds[0] & kinds[1]) - {"step", "kind", "time"}, key=lambda name: (name != "loss", name))
    speeds = sorted(name for name in kinds[0] if name.endswith(report.PER_SECOND))
    made = []
    for name in dict.fromkeys([*both, *(["learning_rate"] if "learning_rate" in kinds[0] else []), *speeds]):
        series = {}
        for run in runs:
            for kind in dict.fromkeys(row["kind"] for row in run.history if name in row):
                if points := report.points(run.history, kind, name):
                    series[f"{run.name} {kind.removeprefix('eval/')}"] = points
        if series:
            made.append(report.curve(name, name.replace("_", " "), series))
    return made


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """Rows in which the columns differ are shaded, unless they are numbers."""
    kind = ' class="number"' if numbers else ""
    lines = ["".join(f"<th{kind if place else ''}>{html.escape(cell)}</th>" for place, cell in enumerate(head))]
    marks = [""]
    for row in rows:
        lines.append("".join(f"<td{kind if place else ''}>{html.escape(cell)}</td>" for place, cell in enumerate(row)))
        marks.append(' class="changed"' if not numbers and len(set(row[1:])) > 1 else "")
    body = "".join(f"<tr{mark}>{line}</tr>" for mark, line in zip(marks, lines, strict=True))
    return f'<div class="scroll"><table class="beside">{body}</table></div>'
