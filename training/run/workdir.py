"""The folder of a run: what identifies it, and whether a configuration may continue it.

`config.json` is the configuration, `overrides.json` what was set on the command line when the run began. Without the
overrides the same run would have to be started with the same long line; with both `train.py --workdir=FOLDER` continues
it. `run.json` is what only this workdir has: an id, where the run branched from another
one, and which keys were changed at which step.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import configs
import naming
from configs import Config
from training.checkpoints import json_text
from training.checkpoints.whole import set_aside
from training.distributed import facts

RECORD = "run.json"
RESUME_FROM = "--resume_from"
WHILE_RUNNING = ("data.on_error", "train.nonfinite", "train.steps", "optim.clip_norm")
"""Keys of a run's identity that may change while it goes on, besides all that are none (`configs.schema.Field`)."""
SHOWN = 6


def begin(
    workdir: Path,
    config: Config,
    overrides: Mapping[str, Any],
    *,
    step: int = 0,
    changes: Sequence[str] = (),
    origin: Mapping[str, Any] | None = None,
) -> str:
    """Notes whose run this is, and returns its id.

    Args:
      step: where it begins or goes on.
      changes: from `check`.
      origin: where it branched from another run.
    """
    json_text.write(workdir / "overrides.json", overrides)
    json_text.write(workdir / "config.json", configs.as_dict(config))
    noted = record(workdir, say=True)
    # Runs of earlier versions had the name of their folder for an id, at Weights & Biases.
    noted.setdefault("id", workdir.name if (workdir / "wandb").is_dir() else uuid.uuid4().hex[:12])
    noted.setdefault("branched_from", dict(origin) if origin else None)
    if changes:
        noted.setdefault("changes", []).append({"step": step, "time": _now(), "keys": list(changes)})
    path = workdir / RECORD
    if path.is_dir():
        set_aside(path)
    json_text.write(path, noted)
    return noted["id"]


def record(workdir: Path, say: bool = False) -> dict[str, Any]:
    """What `run.json` says; nothing if it is not there. A damaged one is as if it were not there.

    Args:
      say: that it is damaged.
    """
    path = workdir / RECORD
    if not path.exists():
        return {}
    with contextlib.suppress(IsADirectoryError, ValueError):
        found = json_text.read(path)
        origin = found.get("branched_from")
        known = origin is None or (isinstance(origin, dict) and {"workdir", "step"} <= origin.keys())
        if known and isinstance(found.get("id", ""), str) and isinstance(found.get("changes", []), list):
            return found
    if say:
        print(f"{path}: damaged; the run gets a new id", file=sys.stderr)
    return {}


def has_checkpoints(workdir: Path) -> bool:
    """Whether there is anything to continue from, damaged or not."""
    folder = workdir / "checkpoints"
    return folder.is_dir() and any(path.name.isdecimal() for path in folder.iterdir())


def retire_summary(workdir: Path, done: Mapping[str, Any]) -> None:
    """Keeps the result of a run that goes on under the name of its step."""
    (workdir / "summary.json").replace(workdir / f"summary-{done['step']}.json")


def overrides(workdir: Path) -> dict[str, Any]:
    """What was set on the command line when the run of this workdir began."""
    path = workdir / "overrides.json"
    return _read(path) if path.exists() else {}


def stored(workdir: Path, overrides: Mapping[str, Any]) -> Config:
    """The configuration of the run that is there, with which it goes on.

    Args:
      overrides: values by dotted key, in place of those that it has.

    Raises:
      FileNotFoundError: there is no run; the line says what is missing.
      ValueError: it is none of this version, or an override is wrong.
    """
    path = workdir / "config.json"
    if not path.is_file():
        there = "holds no run" if workdir.exists() else f"is not there{naming.beside(workdir)}"
        raise FileNotFoundError(
            f"--workdir={workdir}: {there}, and a new one needs --config=FILE, such as --config=quickstart"
        )
    values = _read(path)
    _config_of(values, path)
    return configs.from_dict(values, overrides)


def _config_of(values: Mapping[str, Any], path: Path) -> Config:
    try:
        return configs.from_dict(values)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: cannot be read as a configuration of this version ({error})") from None


def split_step(text: str) -> tuple[str, int | None]:
    """Takes `WORKDIR` or `WORKDIR@STEP` apart: an absolute path, and a step or None for the newest."""
    path, mark, step = text.rpartition("@")
    if not mark or os.path.isdir(text):
        return os.path.abspath(text), None
    if not path or not step.isdecimal():
        raise ValueError(f"{RESUME_FROM}={text}: takes WORKDIR or WORKDIR@STEP, such as runs/trunk@8000")
    return os.path.abspath(path), int(step)


def inherited(resume_from: str, workdir: Path) -> dict[str, Any]:
    """What was set on the command line for the run that a new one branches from; nothing once it has begun."""
    source = Path(split_step(resume_from)[0])
    folder = source.parent.parent if source.parent.name == "checkpoints" else source
    return {} if (workdir / "config.json").exists() else overrides(folder)


def check_writable(folder: Path, name: str) -> None:
    """Refuses a folder that cannot be written, or made, before any work is done; `name` is what the message calls it.

    Raises:
      PermissionError: it, or the nearest folder above that exists, is read-only or a file.
    """
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{name}: cannot be written ({existing} is read-only or a file)")


def check(workdir: Path, config: Config) -> list[str]:
    """Refuses a workdir that holds another run, or that cannot be written; changes nothing.

    Returns:
      What is changed and may be while a run goes on, `key: before -> now`.

    Raises:
      ValueError: the saved configuration is another run; the message lists the differing keys.
      OSError: the folder cannot be written.
    """
    if workdir.exists() and not workdir.is_dir():
        raise NotADirectoryError(f"--workdir={workdir}: is a file, not a folder")
    check_writable(workdir, f"--workdir={workdir}")
    saved = workdir / "config.json"
    if not saved.exists():
        return []
    values = _read(saved)
    _config_of(values, saved)
    refused = [text for text in configs.differences(values, config) if key_of(text) not in WHILE_RUNNING]
    changed = differences(values, config)
    if refused:
        raise ValueError(
            f"--workdir={workdir}: holds a run with another configuration ({shown(refused)}); use another workdir, "
            f"with {RESUME_FROM}={workdir} to go on from the state of this one"
        )
    return changed


def differences(values: Mapping[str, Any], config: Config) -> list[str]:
    """All keys, `key: before -> now`, in which a saved configuration differs, but those of a machine."""
    before, now = configs.flat_values(configs.from_dict(values)), configs.flat_values(config)
    return [
        f"{key}: {before[key]!r} -> {now[key]!r}"
        for key in now
        if before[key] != now[key] and f"config.{key}" not in facts.OF_A_MACHINE
    ]


def key_of(difference: str) -> str:
    """The key of `key: before -> now`."""
    return difference.partition(":")[0]


def shown(differences: Sequence[str]) -> str:
    """The first few of them, in one line."""
    more = f"; and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
    return "; ".join(differences[:SHOWN]) + more


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _read(path: Path) -> dict[str, Any]:
    try:
        return json_text.read(path)
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
