"""What an evaluation leaves behind: a table on the terminal, one JSON file per set, and the report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

import configs
import data
from configs import base
from training.checkpoints import json_text
from training.checkpoints.whole import write_whole
from training.evaluation import report
from training.evaluation.trained import Trained
from training.run.evaluate import Results, scalars
from training.run.evaluations import Samples


def shown(results: Results, columns: Sequence[str]) -> dict[str, float]:
    """The numbers among the results that `columns` names, in its order, and how many examples were left out; all of
    them if it names none.
    """
    numbers = scalars(results)
    chosen = {name: numbers[name] for name in columns if name in numbers}
    return chosen | {name: numbers[name] for name in ("left_out",) if name in numbers} if chosen else numbers


def table(results: Mapping[str, Results], columns: Sequence[str]) -> str:
    """Numbers of every set, one line per set; `columns` chooses and orders them, empty takes all."""
    chosen = {label: shown(found, columns) for label, found in results.items()}
    names = list(dict.fromkeys(name for found in chosen.values() for name in found))
    lines = [[label, *(report.number(found.get(name)) for name in names)] for label, found in chosen.items()]
    return aligned([["set", *names], *lines])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lines of cells as columns, the first to the left, the others to the right."""
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))])
        for row in rows
    )


def write(
    output: Path,
    model: Trained,
    sets: Mapping[str, data.Source],
    results: Mapping[str, Results],
    workdir: Path | None,
    samples: Mapping[str, Samples] | None = None,
) -> list[Path]:
    """Writes `<set>.json` for every set and `report.html`, and returns the files; one process of several does so.

    Args:
      workdir: of the run, for the curves of its training.
      samples: of each set what the report shows of single examples (`Task.samples`).

    Raises:
      OSError: the folder cannot be written.
    """
    if jax.process_index() != 0:
        return []
    about = {
        "model": model.task.model_name,
        "step": model.step,
        "weights": model.weights,
        "config_hash": configs.digest(model.config),
    }
    files = []
    for label, found in results.items():
        info = sets[label].info
        counted = len(sets[label]) - found.get("left_out", 0)
        place = {"set": label, "source": info.name, "split": info.split, "examples": counted}
        content = {**about, **place, "results": found}
        files.append(write_text(output / f"{label}.json", json_text.text(content, indent=1) + "\n"))
    facts = {
        "model": model.task.model_name,
        "step": f"{model.step:,}",
        "weights": "moving average" if model.weights == "ema" else "raw parameters",
        "data": ", ".join(_extent(label, source, results[label]) for label, source in sets.items()),
        "evaluated": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    history = report.read_history(workdir / "metrics.jsonl") if workdir else []
    text = report.render(
        f"{model.task.model_name} on {model.config.data.name}",
        facts,
        {label: shown(found, model.task.columns) for label, found in results.items()},
        {
            label: model.task.report(found, sets[label], (samples or {}).get(label, {}))
            for label, found in results.items()
        },
        report.training_curves(history, model.task.best_metric[0], model.task.unit),
        configs.flat_values(model.config),
        configs.flat_values(configs.from_dict(base.get_config().to_dict())),
        {label: found["left_out_reasons"] for label, found in results.items() if found.get("left_out")},
    )
    return [*files, write_text(output / "report.html", text)]


def _extent(label: str, source: data.Source, results: Results) -> str:
    missing = results.get("left_out", 0)
    extent = f"{len(source) - missing:,} of {len(source):,}" if missing else f"{len(source):,}"
    return f"{label}: {extent} examples"


def write_text(path: Path, text: str) -> Path:
    """Writes a file in one piece, in a folder that is made if absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    return path
