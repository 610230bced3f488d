"""The data that a run began with, noted in `WORKDIR/data.json`.

A run may go on with more or fewer examples, but not with data that mean something else (the task says what). Its
length, `4 epochs`, stays that of the first data: otherwise half the data would end it before the steps that its
schedule was made for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.checkpoints import json_text
from training.run.run import Run

FILE = "data.json"


@dataclasses.dataclass(frozen=True)
class Began:
    """How many examples the training data had, and what the task noted of them (`Task.noted`)."""

    examples: int
    noted: Mapping[str, Any]


def read(workdir: Path) -> Began | None:
    """The data that the run of a workdir began with; None before it began.

    Raises:
      ValueError: the note cannot be read.
    """
    path = workdir / FILE
    if not path.exists():
        return None
    try:
        values = json_text.read(path)
        return Began(int(values.pop("examples")), values)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); without it the run counts the examples of now") from None


def note(workdir: Path, run: Run) -> None:
    """Notes the data of a run that begins; what an earlier start noted stays."""
    path = workdir / FILE
    if not path.exists():
        json_text.write(path, {"examples": run.examples, **run.task.noted(), "total_steps": run.total_steps})


def changes(began: Began, run: Run, where: str) -> list[str]:
    """What a run that goes on should say of data that changed.

    Raises:
      ValueError: they are data of another kind (`Task.check_same_data`).
    """
    run.task.check_same_data(began.noted, where)
    if began.examples == len(run.source):
        return []
    return [
        f"{where}: began with {began.examples} examples, and its data has {len(run.source)} now; it goes on to step "
        f"{run.total_steps}, as first meant"
    ]
