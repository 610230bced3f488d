"""Tar files of WebDataset's form, read in any order by an index of what lies where.

The files of an example lie together and have one name but for what follows its first dot: `dog/0001.jpg`,
`dog/0001.cls`. Each tar file is passed over once, by its headers, and the index is kept in the cache of this machine.
"""

from __future__ import annotations

import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from typing_extensions import override

from data import tree
from data.arrow import IMAGE, LABEL, MASK
from data.cache import made_from
from data.kinds import FieldSpec
from data.names import printable
from data.source import EncodedImage, ExampleError, Info, Record, Source
from data.split import select
from data.stored import files_by_split, find_path, options_of

IMAGES = tuple(ending.removeprefix(".") for ending in tree.EXTENSIONS)
MASKS = ("mask.png", "seg.png")
FIELDS = {"image": IMAGES, "label": ("cls",), "mask": MASKS, "text": ("txt",)}
"""Field -> endings of the files that are read for it, the first that an example has."""
CLASSES = "classes.txt"
ABSENT = -1
END = bytes(1024)
"""What a tar file ends with; one that was cut off between two of its files looks whole otherwise."""


@dataclass(frozen=True)
class Index:
    """What lies where in one tar file.

    Attributes:
        keys: names of the examples without endings, as bytes.
        places: field -> where its file begins and how long it is; `ABSENT` where there is none.
        labels: what the files `cls` say; `ABSENT` where there is none.
    """

    keys: np.ndarray
    places: Mapping[str, Int64[np.ndarray, "n 2"]]
    labels: Int64[np.ndarray, " n"]


def open_tar(argument: str, split: str, directory: str | None = None) -> Source:
    """`tar:PATH`: a tar file of WebDataset's form, or a folder of them whose names or folders say the split.

    Images are read from `jpg`, `png` and the like, labels from `cls`, masks from `mask.png` or `seg.png`, text from
    `txt`. `classes.txt` in the folder, one name a line, says what classes are called.

    Raises:
        FileNotFoundError: there is nothing there.
        ValueError: a file is damaged or packed, holds no images, or there is no such split.
    """
    path, _ = options_of("tar", argument, ())
    place = find_path("tar", path, directory)
    if packed := tree.files(place, (".tar.gz", ".tgz", ".tar.xz", ".tar.zst")) if place.is_dir() else ():
        raise ValueError(
            f"{printable(str(place / packed[0]))} is packed, which has to be read from its start: unpack it"
        )
    name = f"tar:{printable(str(place))}"
    files = files_by_split("tar", place, ".tar")
    indices = {key: [_index(file) for file in some] for key, some in files.items()}
    classes = _classes(place, [one.labels for some in indices.values() for one in some])
    sizes = {key: sum(len(one.keys) for one in some) for key, some in indices.items()}
    return select(split, sizes, lambda key: TarRecords(files[key], indices[key], classes, name, key, sizes))


class TarRecords(Source):
    """One split of a set in tar files."""

    def __init__(
        self,
        files: Sequence[Path],
        indices: Sequence[Index],
        classes: tuple[str, ...],
        name: str,
        split: str,
        sizes: Mapping[str, int],
    ):
        self._files, self._indices = tuple(files), tuple(indices)
        self._starts = np.cumsum([0, *(len(one.keys) for one in indices)])
        specs = {"image": IMAGE, "label": LABEL, "mask": MASK, "text": FieldSpec("text")}
        there = {field for one in indices for field, places in one.places.items() if (places >= 0).any()}
        numbered = classes == tuple(map(str, range(len(classes))))
        self.info = Info(
            name=name,
            split=split,
            fields={field: spec for field, spec in specs.items() if field in there},
            num_examples=int(self._starts[-1]),
            num_classes=len(classes) or None,
            class_names=() if numbered else classes,
            splits=dict(sizes),
        )
        if "image" not in there:
            raise ValueError(f"{name} holds no image for the split {split!r} ({', '.join(IMAGES)})")

    def __len__(self) -> int:
        return self.info.num_examples

    def __getitem__(self, index: int) -> Record:
        shard, row = self._locate(index)
        record: Record = {"index": index}
        for field in self.info.fields:
            if field == "label":
                record[field] = int(self._indices[shard].labels[row])
                missing = record[field] == ABSENT
            else:
                begin, size = self._indices[shard].places[field][row].tolist()
                missing = begin == ABSENT
            if missing:
                raise ExampleError(f"{self.describe(index)} has no {field} (.{', .'.join(FIELDS[field])})")
            if field != "label":
                record[field] = self._value(field, self._content(shard, begin, size, index), index)
        return record

    def _value(self, field: str, content: bytes, index: int) -> object:
        if field == "text":
            return content.decode("utf-8", "replace")
        image = EncodedImage(content, self.describe(index))
        return image.integers() if field == "mask" else image

    def _content(self, shard: int, begin: int, size: int, index: int) -> bytes:
        with open(self._files[shard], "rb") as file:
            file.seek(begin)
            content = file.read(size)
        if len(content) != size:
            raise ExampleError(f"{self.describe(index)} is cut off: {len(content)} of {size} bytes are there")
        return content

    @override
    def describe(self, index: int) -> str:
        shard, row = self._locate(index)
        key = self._indices[shard].keys[row].decode("utf-8", "surrogateescape")
        return f"{printable(key)} in {printable(str(self._files[shard]))}"

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {self.info.name} {self.info.split}, which has {len(self)} examples")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])


def _index(file: Path) -> Index:
    """The index of a tar file, from the cache where it is there."""
    with np.load(made_from(file, "tar", ".npz", lambda place: _write(file, place))) as kept:
        return Index(kept["keys"], {field: kept[field] for field in FIELDS}, kept["labels"])


def _write(file: Path, place: Path) -> None:
    rows: dict[str, int] = {}
    places: dict[str, list[tuple[int, int]]] = {field: [] for field in FIELDS}
    labels: list[int] = []
    shown = printable(str(file))
    with open(file, "rb") as content:
        content.seek(max(file.stat().st_size - len(END), 0))
        if content.read() != END:
            raise ValueError(f"{shown} is damaged, or no plain tar file: it does not end as one does")
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                first, _, ending = name.partition(".")
                field = next((field for field, endings in FIELDS.items() if ending.lower() in endings), None)
                if not member.isreg() or not first or field is None:
                    continue
                key = f"{folder}/{first}" if folder else first
                row = rows.setdefault(key, len(rows))
                if row == len(labels):
                    labels.append(ABSENT)
                    for some in places.values():
                        some.append((ABSENT, ABSENT))
                if places[field][row][0] != ABSENT:
                    raise ValueError(f"{shown} holds two files for the {field} of {printable(key)}")
                places[field][row] = member.offset_data, member.size
                if field == "label":
                    labels[row] = _number(archive, member, shown)
    except tarfile.TarError as error:
        raise ValueError(f"{shown} is damaged, or no plain tar file: {' '.join(str(error).split())}") from error
    keys = np.array([key.encode("utf-8", "surrogateescape") for key in rows], np.bytes_)
    arrays: dict[str, Any] = {field: np.array(some, np.int64).reshape(-1, 2) for field, some in places.items()}
    arrays |= {"keys": keys, "labels": np.array(labels, np.int64)}
    with open(place, "wb") as out:
        np.savez(out, **arrays)


def _number(archive: tarfile.TarFile, member: tarfile.TarInfo, shown: str) -> int:
    stored = archive.extractfile(member)
    text = stored.read().decode("utf-8", "replace").strip() if stored else ""
    if not text.isascii() or not text.isdecimal():
        raise ValueError(f"{shown}: {printable(member.name)} holds {text[:20]!r}, and a class is a number from 0 on")
    return int(text)


def _classes(place: Path, labels: Sequence[Int64[np.ndarray, " n"]]) -> tuple[str, ...]:
    """Names of the classes, or their numbers; nothing without labels."""
    count = max((int(some.max()) + 1 for some in labels if len(some)), default=0)
    file = place / CLASSES if place.is_dir() else place.with_name(CLASSES)
    if not count or not file.is_file():
        return tuple(map(str, range(count)))
    names = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    if len(names) < count:
        raise ValueError(f"{printable(str(file))} names {len(names)} classes, and there is a label {count - 1}")
    return names
