"""Images in folders: class folders to train and evaluate on, or a plain folder to predict on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from typing_extensions import override

from data.source import EncodedImage, Info, Record, Source
from data.split import select

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLIT_FOLDERS = ("train", "val", "valid", "validation", "test")
TEST_SHARE = 0.1


def open_class_folders(argument: str, split: str, directory: str | None = None) -> Source:
    """`folder:PATH` with PATH/<split>/<class>/*.jpg, or PATH/<class>/*.jpg, which is divided by a hash of the name.

    Without split folders `test` holds a tenth of the files and `train` the rest, and adding files moves none of
    the others. A folder `val`, `valid` or `validation` also answers to `test` where there is no such folder. Files
    are ordered by the hash of their name, so that a slice of a split is a fair sample of it.
    """
    root = find_folder("folder", argument, directory)
    folders = {name: root / name for name in SPLIT_FOLDERS if (root / name).is_dir() and _folders(root / name)}
    if folders:
        held_out = next((folders[name] for name in ("val", "valid", "validation") if name in folders), None)
        if held_out is not None:
            folders.setdefault("test", held_out)
        classes = _folders(folders.get("train", next(iter(folders.values()))))
        files = {name: _labelled(folder, classes) for name, folder in folders.items()}
    else:
        classes = _folders(root)
        if not classes:
            raise ValueError(f"folder {root} holds no class folder; wanted <class>/*.jpg or train/<class>/*.jpg in it")
        whole = _labelled(root, classes)
        files = {
            "train": [item for item in whole if _hash(item[0]) >= TEST_SHARE],
            "test": [item for item in whole if _hash(item[0]) < TEST_SHARE],
        }
        folders = {"train": root, "test": root}
    sizes = {name: len(items) for name, items in files.items()}
    return select(split, sizes, lambda name: ImageFiles(folders[name], files[name], name, classes, sizes))


def open_images(argument: str, split: str = "all", directory: str | None = None) -> Source:
    """`images:PATH`: every image below PATH in the order of its name, without labels; its one split is `all`."""
    root = find_folder("images", argument, directory)
    files = [(name, -1) for name in sorted(_images(root))]
    if not files:
        raise ValueError(f"folder {root} holds no image ({', '.join(EXTENSIONS)})")
    sizes = {"all": len(files)}
    return select(split, sizes, lambda name: ImageFiles(root, files, name, (), sizes))


class ImageFiles(Source):
    """Image files with the label of their folder; decoded when used, in RGB."""

    def __init__(
        self, root: Path, files: list[tuple[str, int]], split: str, classes: Iterable[str], sizes: dict[str, int]
    ):
        self._root = root
        self._names = [name for name, _ in files]
        self._labels = np.array([label for _, label in files], np.int64)
        class_names = tuple(classes)
        self.info = Info(
            name=f"folder:{root}",
            split=split,
            fields={"image": "image", "label": "label"} if class_names else {"image": "image"},
            num_examples=len(files),
            num_classes=len(class_names) or None,
            class_names=class_names,
            image_shape=(None, None, 3),
            splits=sizes,
        )

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        path = self._root / self._names[index]
        record: Record = {"index": index, "image": EncodedImage(path, str(path))}
        return {**record, "label": int(self._labels[index])} if self.info.class_names else record

    @override
    def describe(self, index: int) -> str:
        return str(self._root / self._names[index])


def find_folder(kind: str, argument: str, directory: str | None) -> Path:
    """The folder that `kind:argument` names, below `directory` if that is given.

    Raises:
        ValueError: there is no argument.
        FileNotFoundError: there is no such folder.
    """
    root = (Path(directory) / argument if directory else Path(argument)).expanduser()
    if not argument:
        raise ValueError(f"{kind!r} needs the path of a folder: data.name='{kind}:PATH'")
    if not root.is_dir():
        raise FileNotFoundError(f"folder {root} is a file" if root.exists() else f"folder {root} does not exist")
    return root


def _folders(root: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")))


def _images(root: Path) -> list[str]:
    """Paths below `root`, relative to it, with "/" between the parts on every system."""
    found = []
    for parent, _, names in os.walk(root, followlinks=True):
        inside = Path(parent).relative_to(root).as_posix()
        prefix = "" if inside == "." else inside + "/"
        found += [prefix + name for name in names if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
    return found


def _labelled(root: Path, classes: tuple[str, ...]) -> list[tuple[str, int]]:
    """(relative path, label) of every image below root/<class>, ordered by hash."""
    strangers = set(_folders(root)) - set(classes)
    if strangers:
        some = ", ".join(sorted(strangers)[:5])
        raise ValueError(f"folder {root} has classes that the training folder lacks: {some}")
    files = []
    for label, name in enumerate(classes):
        images = _images(root / name) if (root / name).is_dir() else []
        if not images:
            raise ValueError(f"class folder {root / name} holds no image ({', '.join(EXTENSIONS)})")
        files += [(f"{name}/{image}", label) for image in images]
    return sorted(files, key=lambda item: (_hash(item[0]), item[0]))


def _hash(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64
