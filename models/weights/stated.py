"""What has to be done to images, as a file of weights states it itself, or else as the variant of a model has it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from models.core import aliases
from models.core.errors import unknown_name
from models.core.registry import names
from models.weights import files
from models.weights.family import FAMILIES
from models.weights.preprocessing import Preprocessing, from_timm
from models.weights.preprocessor_config import from_transformers
from models.weights.torchvision_files import of_name

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
"""What a file of weights is called where the files beside it are about it: in a folder of Hugging Face's hub."""


class NotSupported(ValueError):
    """What is said of images cannot be done here."""


def preprocessing(source: str | os.PathLike[str]) -> Preprocessing:
    """What images go through before a model sees them.

    Args:
      source: a variant, `"swin_tiny"`, or a file of weights or a folder with one, that says it: in its header, if
        `models.export_weights` or `eval.py --export` wrote it, or in timm's `config.json` or Hugging Face's
        `preprocessor_config.json` beside it; or by its name, if it is torchvision's.

    Raises:
      ValueError: there is no such variant, nothing is known, or what is said is not supported; one line.
      FileNotFoundError: no such file.
    """
    path = Path(source)
    if path.is_dir() or files.is_weight_file(path):
        if not path.is_dir():
            files.check(path)
        found = of_file(path)
        if found is None:
            raise ValueError(f"{path}: nothing in it or beside it says what its images go through")
        return found
    found = of_variant(str(source))
    if found is None:
        known = names()
        if str(source) in known or aliases.meaning(str(source)):
            raise ValueError(f"model {source}: what its images go through is said by a file of its weights only")
        raise ValueError(
            unknown_name("model or file of weights", str(source), known, aliases.nearest(str(source), known))
        )
    return found


def of_variant(name: str) -> Preprocessing | None:
    """That of the published weights of a variant, also by timm's name; None for a model that no family has, and for
    names of weights whose images may go through something else, as those of Hugging Face do.
    """
    name = aliases.first_weights(name) or name
    return next((family.preprocessing[name] for family in FAMILIES.values() if name in family.preprocessing), None)


def of_file(path: str | os.PathLike[str]) -> Preprocessing | None:
    """That of a file of weights, or of the one in a folder; None where nothing is said.

    Raises:
      NotSupported: what is said cannot be read, or is something that there is not here; one line.
      ValueError: the file is damaged.
    """
    place = Path(path)
    if not place.exists():
        return None
    if place.name.lower().endswith(".safetensors"):
        noted = files.notes(place).get(files.PREPROCESSING)
        if noted is not None:
            return _read(place, noted, Preprocessing.of_json, "its header")
    if (by_name := of_name(place)) is not None:
        return dataclasses.replace(by_name, source="torchvision's file of this name")
    folder = place if place.is_dir() else place.parent
    if folder != place and place.name not in HUB_FILES and not _is_alone(place):
        return None
    for name, take in _BESIDE.items():
        file = folder / name
        if file.is_file() and (found := _read(file, _json(file), take, name)) is not None:
            return found
    return None


def _of_config(settings: Any) -> Preprocessing | None:
    """timm's `config.json`, in older ones without the key `pretrained_cfg`; those of others say nothing of images."""
    if not isinstance(settings, Mapping):
        return None
    stated = settings.get("pretrained_cfg", settings)
    return from_timm(stated) if isinstance(stated, Mapping) and "input_size" in stated else None


_BESIDE: dict[str, Callable[[Any], Preprocessing | None]] = {
    "config.json": _of_config,
    "preprocessor_config.json": from_transformers,
}


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise NotSupported(f"{file}: it is no JSON, so what images go through cannot be read: {error}") from error


def _read(file: Path, noted: Any, take: Callable[[Any], Preprocessing | None], source: str) -> Preprocessing | None:
    try:
        found = take(noted)
    except ValueError as error:
        raise NotSupported(f"{file}: what it says that images go through is not supported: {error}") from error
    return found and dataclasses.replace(found, source=source)


def _is_alone(file: Path) -> bool:
    others = (other for other in file.parent.iterdir() if other != file)
    return not any(other.name.lower().endswith(files.SUFFIXES) for other in others)
