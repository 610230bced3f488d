"""The folder of a run: what identifies it, and whether a configuration may continue it.

`config.json` is the configuration, `overrides.json` what was set on the command line when the run began. Without the
overrides the same run would have to be started with the same long line; with them `train.py --config=FILE
--workdir=FOLDER` continues it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import configs
from configs import Config
from training.checkpoints import json_text


def begin(workdir: Path, config: Config, overrides: Mapping[str, Any]) -> None:
    """Notes whose run this is."""
    json_text.write(workdir / "overrides.json", overrides)
    json_text.write(workdir / "config.json", configs.as_dict(config))


def overrides(workdir: Path) -> dict[str, Any]:
    """What was set on the command line when the run of this workdir began."""
    path = workdir / "overrides.json"
    return _read(path) if path.exists() else {}


def check_writable(folder: Path, name: str) -> None:
    """Refuses a folder that cannot be written, or made, before any work is done; `name` is what the message calls it.

    Raises:
      PermissionError: it, or the nearest folder above that exists, is read-only or a file.
    """
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{name}: cannot be written ({existing} is read-only or a file)")


def check(workdir: Path, config: Config) -> None:
    """Refuses a workdir that holds another run, or that cannot be written; changes nothing.

    Raises:
      ValueError: the saved configuration is another run; the message lists the differing keys.
      OSError: the folder cannot be written.
    """
    if workdir.exists() and not workdir.is_dir():
        raise NotADirectoryError(f"--workdir={workdir}: is a file, not a folder")
    check_writable(workdir, f"--workdir={workdir}")
    saved = workdir / "config.json"
    if not saved.exists():
        return
    values = _read(saved)
    try:
        changed = configs.differences(values, config)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{saved}: cannot be read as a configuration of this version ({error})") from None
    if changed:
        shown = "; ".join(changed[:6]) + (f"; and {len(changed) - 6} more" if len(changed) > 6 else "")
        raise ValueError(f"--workdir={workdir}: holds a run with another configuration ({shown}); use another workdir")


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
