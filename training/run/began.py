"""The data that a run began with, noted in `WORKDIR/data.json`.

A run may go on with more or fewer examples, but not with labels that mean other classes. Its length, `4 epochs`, stays
that of the first data: otherwise half the data would end it before the steps that its schedule was made for.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from training.checkpoints import json_text
from training.run.run import Run

FILE = "data.json"


@dataclasses.dataclass(frozen=True)
class Began:
    """What the training data were; `class_names` is empty where they have no names."""

    examples: int
    num_classes: int | None
    class_names: tuple[str, ...]


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
        return Began(int(values["examples"]), values["num_classes"], tuple(values["class_names"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); without it the run counts the examples of now") from None


def note(workdir: Path, run: Run) -> None:
    """Notes the data of a run that begins; what an earlier start noted stays."""
    path, info = workdir / FILE, run.source.info
    if not path.exists():
        began = Began(run.examples, info.num_classes, info.class_names)
        json_text.write(path, {**dataclasses.asdict(began), "total_steps": run.total_steps})


def changes(began: Began, run: Run, where: str) -> list[str]:
    """What a run that goes on should say of data that changed.

    Raises:
      ValueError: they are data of another kind (`Task.check_same_data`), such as other classes.
    """
    run.task.check_same_data(dataclasses.asdict(began), where)
    if began.examples == len(run.source):
        return []
    return [
        f"{where}: began with {began.examples} examples, and its data has {len(run.source)} now; it goes on to step "
        f"{run.total_steps}, as first meant"
    ]
