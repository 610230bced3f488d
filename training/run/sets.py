"""The evaluation sets of a configuration: which data, seen how, how often, and by what task options."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import configs
import data
import naming
from configs import Config, Duration
from data.split import usual_name
from training.run import feeding

KEYS = ("label", "source", "split", "transforms", "options", "batch_size", "every_steps", "fit")


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """One set to evaluate on.

    Attributes:
      label: its name in logs, tables and files.
      place: (source, split).
      config: the configuration of the run with what this set changes: transforms, batch size, task options. Sets that
        change nothing share one object.
      every: time between its evaluations; None for `eval.every_steps`.
      fit: (source, split) of the set that is seen before, by `Task.fit_metrics`; None for none.
    """

    label: str
    place: tuple[str, str]
    config: Config
    every: Duration | None = None
    fit: tuple[str, str] | None = None

    def open(self) -> data.Source:
        """Its examples."""
        return feeding.open_source(self.config, *self.place)

    def open_fit(self) -> data.Source | None:
        """The examples that are seen before; None for none."""
        return feeding.open_source(self.config, *self.fit) if self.fit else None


def described(config: Config) -> dict[str, EvalSet]:
    """The evaluation sets of a configuration by label: `data.eval_split` first, then `eval.sets`.

    An entry of `eval.sets` is the text `label=source@split`, where an empty source is `data.name`, as in
    `train=@train[:500]`; or a mapping with the keys `label` and `split` and any of the other `KEYS`.

    Raises:
      ValueError: an entry that cannot be read, or a label that is used twice.
    """
    label = re.sub(r"[^\w.-]+", "_", config.data.eval_split).strip("_")
    fit = _place(config, config.eval.fit, "config.eval.fit") if config.eval.fit else None
    sets = {label: EvalSet(label, (config.data.name, config.data.eval_split), config, fit=fit)}
    for entry in config.eval.sets:
        found = _of_mapping(config, entry) if isinstance(entry, Mapping) else _of_text(config, entry)
        if found.label in sets:
            raise ValueError(f"config.eval.sets: the label {found.label!r} is used twice; there is {', '.join(sets)}")
        sets[found.label] = found
    return sets


def first(config: Config) -> data.Source:
    """The set that checkpoints are chosen on."""
    return next(iter(described(config).values())).open()


def _of_text(config: Config, entry: str) -> EvalSet:
    label, equals, place = str(entry).partition("=")
    if not (equals and "@" in place and place.rpartition("@")[2] and re.fullmatch(r"[\w.-]+", label)):
        raise ValueError(
            f"config.eval.sets: {entry!r} is not 'label=source@split', such as 'train=digits@train[:500]' "
            "(label: letters, digits, '_', '-', '.'; an empty source is data.name)"
        )
    return EvalSet(label, _place(config, place, f"config.eval.sets: {entry!r}"), config)


def _of_mapping(config: Config, entry: Mapping[str, Any]) -> EvalSet:
    label = str(entry.get("label", ""))
    where = f"config.eval.sets: {label or dict(entry)!r}"
    for key in entry:
        if key not in KEYS:
            raise ValueError(f"{where}: {naming.unknown('key', str(key), KEYS)}")
    if not re.fullmatch(r"[\w.-]+", label) or not entry.get("split"):
        raise ValueError(f"{where}: needs a label (letters, digits, '_', '-', '.') and a split")
    changes: dict[str, Any] = {}
    if "transforms" in entry:
        changes["data__eval_transforms"] = entry["transforms"]
    if "batch_size" in entry:
        changes["eval__batch_size"] = entry["batch_size"]
    if entry.get("options"):
        options = entry["options"]
        if not isinstance(options, Mapping):
            raise ValueError(f"{where}: options takes options of the task, such as {{'tile': 64}}, not {options!r}")
        changes["task__options"] = {**config.task.options, **options}
    try:
        changed = configs.replace(config, **changes) if changes else config
        every = Duration.parse(entry["every_steps"]) if "every_steps" in entry else None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    fit = _place(config, str(entry["fit"]), f"{where}: fit") if entry.get("fit") else None
    place = (str(entry.get("source") or config.data.name), str(entry["split"]))
    return EvalSet(label, place, changed, every, fit)


def _place(config: Config, text: str, where: str) -> tuple[str, str]:
    source, at, split = text.rpartition("@")
    if not (at and split):
        raise ValueError(f"{where}: {text!r} is not 'source@split', such as '@train' for data.name")
    return source or config.data.name, split


def notes(config: Config, sets: Mapping[str, data.Source]) -> list[str]:
    """What to know of the evaluation sets of a run: what it says itself, that checkpoints are chosen on a test set.

    Args:
      sets: by label; the first is the one that checkpoints are chosen on.
    """
    found = [note for source in sets.values() for note in source.info.notes]
    info = next(iter(sets.values())).info if sets else None
    if info is not None and config.checkpoint.keep_best:
        spare = next((name for name in info.splits if usual_name(name) == "val"), None)
        if spare and {usual_name(part.partition("[")[0].strip()) for part in info.split.split("+")} == {"test"}:
            found.append(
                f"the best checkpoints are chosen on the split {info.split!r} of {info.name}; to keep it for the end, "
                f"choose on {spare!r}: --config.data.eval_split={spare}"
            )
    return found
