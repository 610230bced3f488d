"""What lies in a folder of images: class folders and files, without what is hidden and without links that loop."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "lost+found")
"""What packers, file servers and file systems leave behind; folders whose names begin with a dot are hidden too."""


def folders(root: Path) -> tuple[str, ...]:
    """The names of the folders in `root`, in order.

    Raises:
        OSError: `root` cannot be read.
    """
    return tuple(sorted(name for name, _ in _inner(str(root), (os.path.realpath(root),))))


def images(folder: Path, within: Path | None = None) -> list[str]:
    """Paths of the images below `folder`, as `files` gives them."""
    return files(folder, EXTENSIONS, within)


def files(folder: Path, endings: tuple[str, ...], within: Path | None = None) -> list[str]:
    """Paths of the files below `folder` whose names end so, in small letters or large, relative to it, with "/"
    between the parts on every system.

    Links are followed, but not to a folder that they lie in, nor to `within`, the whole that `folder` is a part of.

    Raises:
        OSError: a folder cannot be read.
    """
    above = tuple(os.path.realpath(place) for place in (within, folder) if place is not None)
    found, waiting = [], [("", str(folder), above)]
    while waiting:
        prefix, place, above = waiting.pop()
        inner = dict(_inner(place, above))
        waiting += [(f"{prefix}{name}/", os.path.join(place, name), (*above, real)) for name, real in inner.items()]
        with os.scandir(place) as entries:
            found += [
                prefix + entry.name
                for entry in entries
                if entry.name.lower().endswith(endings) and not entry.name.startswith(".") and not _is_folder(entry)
            ]
    return found


def _inner(folder: str, above: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(name, real path) of each folder in `folder`; `above` are the real paths of those on the way to it."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name in SYSTEM_FOLDERS or not _is_folder(entry):
                continue
            linked = entry.is_symlink()
            real = os.path.realpath(entry.path) if linked else os.path.join(above[-1], entry.name)
            # Only a link can lead back; it loops if it leads to one of those above, or to what holds one.
            if not (linked and any(place == real or place.startswith(os.path.join(real, "")) for place in above)):
                yield entry.name, real


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
