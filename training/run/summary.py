"""`workdir/summary.json`: the result of a finished run, for people and for tables that are made from many runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import configs
from training.checkpoints import checkpoint, json_text
from training.checkpoints.whole import set_aside
from training.distributed import facts
from training.run import evaluate
from training.run.run import Run


def completed(workdir: Path) -> dict[str, Any] | None:
    """The summary of a finished run, or None; also where it is damaged, as the run finds everything in it again."""
    try:
        found = json_text.read(workdir / "summary.json")
        return found if isinstance(found["step"], int) else None
    except (FileNotFoundError, IsADirectoryError, ValueError, KeyError, TypeError):
        return None


def make(
    run: Run,
    step: int,
    params: Mapping[str, np.ndarray],
    results: Mapping[str, Mapping[str, Any]],
    failures: Mapping[str, str],
    totals: Mapping[str, float],
) -> dict[str, Any]:
    """Gathers metrics (fractions, not percent), why sets have none, provenance and a hash of the parameters."""
    return {
        "step": step,
        "metrics": {label: evaluate.scalars(result) for label, result in results.items()},
        "config_hash": configs.digest(run.config),
        "params_sha256": checkpoint.params_sha256(params),
        "commit": facts.commit(),
        "seed": run.config.seed,
        "model": run.task.model_name,
        "data": run.config.data.name,
        "parameters": int(sum(p.size for p in params.values())),
        "versions": facts.versions(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **{name: round(value, 4) for name, value in totals.items()},
        **({"failed_evaluations": dict(failures)} if failures else {}),
    }


def write(workdir: Path, result: Mapping[str, Any]) -> None:
    """Writes the summary in one piece."""
    path = workdir / "summary.json"
    if path.is_dir():
        set_aside(path)
    json_text.write(path, result)
