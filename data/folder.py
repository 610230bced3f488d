"""Images in folders: class folders to train and evaluate on, or a plain folder to predict on."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Int
from typing_extensions import override

from data import tree
from data.kinds import FieldSpec
from data.names import nearest, printable
from data.source import EncodedImage, Info, Record, Source
from data.split import SPELLINGS, find_split, names_in, select, usual_name

TEST_SHARE = 0.1
IMAGE = FieldSpec("image", (None, None, 3), "uint8")
Files = list[tuple[str, int]]
"""Relative paths and labels."""


def open_class_folders(argument: str, split: str, directory: str | None = None) -> Source:
    """`folder:PATH` with PATH/<split>/<class>/*.jpg, or PATH/<class>/*.jpg, which is divided by a hash of the name.

    Split folders may have any usual spelling of `train`, `val` and `test` (`Training`, `dev`), and so may `split`; one
    that cannot be used is an error only where it is asked for. `val` also answers to `test` where there is no such
    folder. Without split folders `test` holds a tenth of the files, which answers to `val` as well, and `train` the
    rest; more files move none of the others. Files are ordered by the hash of their name, so that a slice of a split is
    a fair sample of it.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder or the split cannot be used; the message names the folder and the key.
    """
    root = find_folder("folder", argument, directory)
    folders, without_classes = _split_folders(root)
    if not folders:
        return _open_undivided(root, split)
    classes = _classes(folders.get("train", next(iter(folders.values()))))
    problems = {name: f"folder {printable(str(path))} holds no class folder" for name, path in without_classes.items()}
    files: dict[str, Files] = {}
    for name, folder in folders.items():
        try:
            files[name] = _labelled(folder, classes, complete=name == "train")
        except ValueError as error:
            problems[name] = str(error)
    sizes = {name: len(items) for name, items in files.items()}
    names = {name: name for name in (*files, *problems)}
    if "val" in names:
        names.setdefault("test", "val")

    def whole(name: str) -> Source:
        return ImageFiles(folders[names[name]], files[names[name]], name, classes, sizes)

    try:
        for name in names_in(split):
            chosen = names[find_split(name, names)]
            if chosen in problems:
                raise ValueError(problems[chosen])
        return select(split, {name: sizes[real] for name, real in names.items() if real in sizes}, whole)
    except ValueError as error:
        place = f"split folders of {printable(str(root))}"
        raise ValueError(f"{error} ({place}; see data.train_split and data.eval_split)") from None


def _open_undivided(root: Path, split: str) -> Source:
    classes = _classes(root)
    if not classes:
        raise ValueError(
            f"folder {printable(str(root))} holds no class folder; wanted <class>/*.jpg or train/<class>/*.jpg in it"
        )
    whole = _labelled(root, classes, complete=True)
    return _divided(root, split, _by_hash(whole), classes)


def _by_hash(files: Files) -> dict[str, Files]:
    """A tenth of them as `test` and the rest as `train`; more files move none of the others."""
    return {
        "train": [item for item in files if _hash(item[0]) >= TEST_SHARE],
        "test": [item for item in files if _hash(item[0]) < TEST_SHARE],
    }


def _divided(root: Path, split: str, files: dict[str, Files], classes: Iterable[str]) -> Source:
    """A split of files that no folder divides; the part that is held out answers to `val` as well as to `test`."""
    sizes = {name: len(items) for name, items in files.items()}
    names = {name: name for name in files} | {"val": "test"}

    def whole(name: str) -> Source:
        return ImageFiles(root, files[names[name]], name, classes, sizes)

    return select(split, {name: sizes[real] for name, real in names.items()}, whole)


def open_images(argument: str, split: str = "all", directory: str | None = None) -> Source:
    """`images:PATH`: images without labels, all below PATH as `all`, and the splits that its folders are named after.

    `all` is in the order of the names. Without split folders `test` (or `val`) is a tenth of the files and `train` the
    rest, by a hash of the name, as for class folders.
    """
    root = find_folder("images", argument, directory)
    everything = [(name, -1) for name in sorted(tree.images(root))]
    if not everything:
        raise ValueError(f"folder {printable(str(root))} holds no image ({', '.join(tree.EXTENSIONS)})")
    if names_in(split) == ["all"]:  # a stray folder is no reason to refuse it
        sizes = {"all": len(everything)}
        return select(split, sizes, lambda name: ImageFiles(root, everything, name, (), sizes))
    named = _named_as_splits(root)
    if not named:
        ordered = sorted(everything, key=lambda item: (_hash(item[0]), item[0]))
        return _divided(root, split, {**_by_hash(ordered), "all": everything}, ())
    files = {usual: [item for item in everything if item[0].startswith(f"{at.name}/")] for usual, at in named.items()}
    files["all"] = everything
    sizes = {name: len(items) for name, items in files.items()}
    return select(split, sizes, lambda name: ImageFiles(root, files[name], name, (), sizes))


class ImageFiles(Source):
    """Image files with the label of their folder; decoded when used, in RGB."""

    def __init__(self, root: Path, files: Files, split: str, classes: Iterable[str], sizes: dict[str, int]):
        self._root = root
        self._names = [name for name, _ in files]
        self._labels = np.array([label for _, label in files], np.int64)
        class_names = tuple(classes)
        self.info = Info(
            name=f"folder:{printable(str(root))}",
            split=split,
            fields={"image": IMAGE, "label": FieldSpec("label", (), "int64")} if class_names else {"image": IMAGE},
            num_examples=len(files),
            num_classes=len(class_names) or None,
            class_names=class_names,
            splits=sizes,
            notes=_absent(class_names, self._labels, f"split {split!r} of {printable(str(root))}"),
        )

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        path = self._root / self._names[index]
        record: Record = {"index": index, "image": EncodedImage(path, printable(str(path)))}
        return {**record, "label": int(self._labels[index])} if self.info.class_names else record

    @override
    def describe(self, index: int) -> str:
        return printable(str(self._root / self._names[index]))


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
        place = printable(str(root))
        raise FileNotFoundError(f"folder {place} is a file" if root.exists() else f"folder {place} does not exist")
    return root


def _split_folders(root: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """The folders that are named as splits are, by the usual name: those that hold class folders, and the others."""
    named = _named_as_splits(root)
    divided = {usual: named[usual] for usual in SPELLINGS if usual in named and tree.folders(named[usual])}
    return divided, {usual: folder for usual, folder in named.items() if usual not in divided}


def _named_as_splits(root: Path) -> dict[str, Path]:
    """The folders that are named as splits are, by the usual name."""
    named: dict[str, Path] = {}
    for name in tree.folders(root):
        usual = usual_name(name)
        if usual in named:
            raise ValueError(
                f"folder {printable(str(root))} holds {named[usual].name!r} and {name!r}, which both name the split "
                f"{usual!r} (data.train_split, data.eval_split): rename one"
            )
        if usual in SPELLINGS:
            named[usual] = root / name
    return named


def _classes(root: Path) -> dict[str, str]:
    """The folder of each class in `root`, ordered by class.

    A class has the name of its folder in composed Unicode, since macOS writes accents as characters of their own.
    """
    found: dict[str, str] = {}
    for folder in tree.folders(root):
        name = unicodedata.normalize("NFC", printable(folder))
        if name in found:
            raise ValueError(f"folder {printable(str(root))} holds two class folders whose names look alike: {name!r}")
        found[name] = folder
    return dict(sorted(found.items()))


def _labelled(root: Path, classes: Iterable[str], complete: bool) -> Files:
    """(relative path, label) of every image below root/<class>, ordered by hash; `complete` wants all classes there."""
    place, folders, names = printable(str(root)), _classes(root), list(classes)
    strangers = sorted(set(folders) - set(names))
    if strangers:
        raise ValueError(
            f"folder {place} has classes that the training folder lacks: {', '.join(strangers[:5])}"
            f"{nearest(strangers[0], names)}"
        )
    files: Files = []
    for label, name in enumerate(names):
        folder = root / folders.get(name, name)
        images = tree.images(folder, within=root) if name in folders else []
        # A held-out set may lack a class, but not hold a class whose files are none that can be read.
        if not images and (complete or (name in folders and any(folder.iterdir()))):
            raise ValueError(f"class folder {printable(str(folder))} holds no image ({', '.join(tree.EXTENSIONS)})")
        files += [(f"{folders[name]}/{image}", label) for image in images]
    if not files:
        raise ValueError(f"folder {place} holds no image ({', '.join(tree.EXTENSIONS)})")
    return sorted(files, key=lambda item: (_hash(item[0]), item[0]))


def _absent(classes: tuple[str, ...], labels: Int[np.ndarray, " n"], where: str) -> tuple[str, ...]:
    """A sentence on the classes of which there is no image, if there are some."""
    present = set(labels.tolist())
    names = [name for label, name in enumerate(classes) if label not in present]
    some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return (f"{where} has no image of {len(names)} of {len(classes)} classes: {some}",) if names else ()


def _hash(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "big") / 2**64
