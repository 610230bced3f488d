"""What sets that are stored in files have in common: `KIND:PATH,field=column`, and which files are of which split."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data import tree
from data.names import printable
from data.split import SPELLINGS, usual_name
from naming import unknown

_OPTION = re.compile(r",(\w+)=([^,=/]*)$")


def options_of(kind: str, argument: str, known: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Takes `PATH,field=column,...` apart.

    Args:
        kind: of the set, for messages.
        known: the fields that may be given.

    Raises:
        ValueError: a field that may not be given, or one without a column.
    """
    options: dict[str, str] = {}
    path = argument
    while match := _OPTION.search(path):
        field, column = match.groups()
        if field not in known:
            raise ValueError(f"data.name='{kind}:{argument}': {unknown('option', field, known)}")
        if not column:
            raise ValueError(f"data.name='{kind}:{argument}': {field}= needs the name of a column")
        options[field], path = column, path[: match.start()]
    return path, options


def find_path(kind: str, path: str, directory: str | None) -> Path:
    """The file or folder that `kind:path` names, below `directory` if that is given.

    Raises:
        ValueError: there is no path.
        FileNotFoundError: there is nothing there.
    """
    if not path:
        raise ValueError(f"{kind!r} needs a path: data.name='{kind}:PATH'")
    place = (Path(directory) / path if directory else Path(path)).expanduser()
    if not place.exists():
        raise FileNotFoundError(f"{printable(str(place))} does not exist (data.name='{kind}:PATH')")
    return place


def json_of(path: Path, key: str, *default: Any) -> Any:
    """What a file of JSON says under a key.

    Raises:
        ValueError: it is damaged or has no such key; one line with its name.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found.get(key, *default) if default else found[key]
    except (ValueError, KeyError, AttributeError, TypeError, FileNotFoundError) as error:
        raise ValueError(f"{printable(str(path))} is damaged or missing: it should say {key!r}") from error


def files_by_split(kind: str, place: Path, suffix: str) -> dict[str, list[Path]]:
    """The files of each split, in the order of their names.

    A split is a folder that is named as one, `validation/0.parquet`, or a word of the name of a file,
    `imagenet-validation-0001.parquet`; `data/` in between does not matter. Where nothing is named as a split, all files
    are `train`.

    Args:
        place: a folder, or one file.
        suffix: that all the files have, such as `".parquet"`.

    Raises:
        ValueError: there is no such file, or some are of a split and others are not.
    """
    if place.is_file():
        return {"train": [place]}
    files = [place / name for name in sorted(tree.files(place, (suffix,)))]
    if not files:
        raise ValueError(f"folder {printable(str(place))} holds no {suffix} file (data.name='{kind}:PATH')")
    found: dict[str, list[Path]] = {}
    for file in files:
        found.setdefault(_split_of(file.relative_to(place)), []).append(file)
    if "" in found and len(found) > 1:
        raise ValueError(
            f"{printable(str(found[''][0]))} is of no split, and others of {printable(str(place))} are of "
            f"{', '.join(sorted(set(found) - {''}))}: name its folder or the file after one"
        )
    return {split or "train": files for split, files in found.items()}


def _split_of(path: Path) -> str:
    """The usual name of the split that a folder or a word of the file is named after; empty for none."""
    for name in path.parts[:-1]:
        if (usual := usual_name(name)) in SPELLINGS:
            return usual
    words = (usual_name(word) for word in re.split(r"[-_.]", path.name))
    return next((word for word in words if word in SPELLINGS), "")
