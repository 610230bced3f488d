"""What an evaluation leaves behind: a table on the terminal, one JSON file per set, and the report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import configs
import data
from configs import base
from training.checkpoints import json_text
from training.checkpoints.checkpoint_layout import params_sha256
from training.checkpoints.whole import write_whole
from training.distributed import facts, hostread
from training.evaluation import report
from training.evaluation.trained import Trained
from training.run.evaluate import Results, scalars
from training.run.evaluations import Samples
from training.run.terminal import format_time


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
    *,
    command: str = "",
    seconds: float | None = None,
) -> list[Path]:
    """Writes `<set>.json` for every set and `report.html`, and returns the files; one process of several does so.

    Args:
      workdir: of the run, for the curves of its training.
      samples: of each set what the report shows of single examples (`Task.samples`).
      command: as it was typed.
      seconds: that the evaluation of all sets took.

    Raises:
      OSError: the folder cannot be written.
    """
    about = _about(model, command, seconds)
    if jax.process_index() != 0:
        return []
    values = configs.flat_values(model.config)
    files = []
    for label, found in results.items():
        info = sets[label].info
        counted = len(sets[label]) - found.get("left_out", 0)
        place = {"set": label, "source": info.name, "split": info.split, "examples": counted}
        content = {**about, **place, "results": found, "config": values}
        files.append(write_text(output / f"{label}.json", json_text.text(content, indent=1) + "\n"))
    extents = {"data": ", ".join(_extent(label, source, results[label]) for label, source in sets.items())}
    history = report.read_history(workdir / "metrics.jsonl") if workdir else []
    text = report.render(
        f"{model.task.model_name} on {model.config.data.name}",
        extents | said(about),
        {label: shown(found, model.task.columns) for label, found in results.items()},
        {
            label: model.task.report(found, sets[label], (samples or {}).get(label, {}))
            for label, found in results.items()
        },
        report.training_curves(history, model.task.best_metric[0], model.task.unit),
        values,
        configs.flat_values(configs.from_dict(base.get_config().to_dict())),
        {label: found["left_out_reasons"] for label, found in results.items() if found.get("left_out")},
    )
    return [*files, write_text(output / "report.html", text)]


def _about(model: Trained, command: str, seconds: float | None) -> dict[str, Any]:
    """What was evaluated, by what code, on what, when: everything that a number is of."""
    params = hostread.read(model.params)
    return {
        "model": model.task.model_name,
        "parameters": int(sum(array.size for array in params.values())),
        "step": model.step,
        "weights": model.weights,
        "weights_from": model.origin,
        "params_sha256": params_sha256(params),
        "config_hash": configs.digest(model.config),
        "commit": facts.commit(),
        "versions": facts.versions(),
        "devices": facts.devices(),
        "evaluated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **({} if seconds is None else {"seconds": round(seconds, 3)}),
        **({"command": command} if command else {}),
    }


def said(about: Mapping[str, Any]) -> dict[str, str]:
    """The same for people, as far as it is known: a file of an earlier version has less."""
    found = {
        "model": about["model"],
        "parameters": f"{about['parameters']:,}" if "parameters" in about else "",
        "step": f"{about['step']:,}",
        "weights": "moving average" if about["weights"] == "ema" else "raw parameters",
        "read from": about.get("weights_from", ""),
        "SHA-256 of the parameters": about.get("params_sha256", ""),
        "commit": about.get("commit", ""),
        "versions": ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items()),
        "devices": about.get("devices", ""),
        "evaluated": about.get("evaluated", "").replace("T", " ").replace("Z", " UTC"),
        "in": format_time(about["seconds"]) if "seconds" in about else "",
        "command": about.get("command", ""),
    }
    return {name: text for name, text in found.items() if text}


def _extent(label: str, source: data.Source, results: Results) -> str:
    missing = results.get("left_out", 0)
    extent = f"{len(source) - missing:,} of {len(source):,}" if missing else f"{len(source):,}"
    return f"{label}: {extent} examples"


def write_text(path: Path, text: str) -> Path:
    """Writes a file in one piece, in a folder that is made if absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    return path
