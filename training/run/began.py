"""The data that a run began with, noted in `WORKDIR/data.json`.

A run may go on with more or fewer examples, but not with labels that mean other classes. Its length, `4 epochs`, stays
that of the first data: otherwise half the data would end it before the steps that its schedule was made for.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import data
from data import classes
from training.checkpoints.whole import write_whole
from training.run.run import Run

FILE = "data.json"


@dataclasses.dataclass(frozen=True)
class Began:
    """What the training data were: `classes` has names as far as they have some."""

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
        values = json.loads(path.read_text())
        return Began(int(values["examples"]), values["num_classes"], tuple(values["class_names"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); without it the run counts the examples of now") from None


def note(workdir: Path, run: Run) -> None:
    """Notes the data of a run that begins; what an earlier start noted stays."""
    path, info = workdir / FILE, run.source.info
    if not path.exists():
        began = Began(run.examples, info.num_classes, info.class_names)
        write_whole(path, json.dumps({**dataclasses.asdict(began), "total_steps": run.total_steps}, indent=1))


def changes(began: Began, run: Run, where: str) -> list[str]:
    """What a run that goes on should say of data that changed.

    Raises:
      ValueError: labels would mean other classes (`check_labels`).
    """
    check_labels(dataclasses.asdict(began), run.source.info, where)
    if began.examples == len(run.source):
        return []
    return [
        f"{where}: began with {began.examples} examples, and its data has {len(run.source)} now; it goes on to step "
        f"{run.total_steps}, as first meant"
    ]


def check_labels(before: Mapping[str, Any], now: data.Info, where: str) -> None:
    """Refuses data in which a label means another class than it did.

    Args:
      before: `num_classes` and `class_names` as the run or a checkpoint noted them.
      where: whose they are, for the message.

    Raises:
      ValueError: the first difference, in one line.
    """
    names, count = tuple(before.get("class_names", ())), before.get("num_classes")
    advice = "give it the data it had, or start another workdir with config.model.init_from"
    if count != now.num_classes:
        raise ValueError(f"{where}: its data had {count} classes and has {now.num_classes} now; {advice}")
    if len(names) != count or len(now.class_names) != count:
        return
    if (label := classes.moved(names, now.class_names)) is not None:
        old, new = names[label], now.class_names[label]
        raise ValueError(f"{where}: label {label} was {old!r} and is {new!r} in {now.name!r} now; {advice}")
