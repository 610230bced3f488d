"""Records in Arrow files: sets that Hugging Face's `datasets` saved to disk, and parquet files.

What a column is, its type says, or Hugging Face's description of it, which is kept in the file: images are bytes, or
`{bytes, path}`; classes are numbers with names. Files are mapped into memory, so that any record is read without those
before it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from data.kinds import FieldSpec
from data.names import printable
from data.source import EncodedImage, ExampleError, Info, Record, Source
from naming import unknown

IMAGE = FieldSpec("image", (None, None, 3), "uint8")
MASK = FieldSpec("mask", (None, None))
LABEL = FieldSpec("label", (), "int64")
MASKS = ("mask", "annotation", "segmentation")
"""Names of columns whose images are one class a pixel."""


@dataclass(frozen=True)
class Field:
    """A field and the column that it is read from.

    Attributes:
        classes: names of its classes, of a label that has some.
        places: the class of each value, of a label that is stored as text.
    """

    column: str
    spec: FieldSpec
    classes: tuple[str, ...] = ()
    places: Mapping[str, int] | None = None


class Rows:
    """The rows of Arrow files one after another, in any order of access.

    Args:
        names: what the files are called in messages, where they are copies of others.

    Raises:
        ValueError: a file is damaged or has other columns than the first; one line with its name.
    """

    def __init__(self, files: Sequence[Path], names: Sequence[Path] | None = None):
        self._files = tuple(files)
        self._names = [printable(str(name)) for name in names or files]
        self._open()

    def _open(self) -> None:
        found = [_read(file, name) for file, name in zip(self._files, self._names, strict=True)]
        self.schema = found[0].schema
        for other, name in zip(found, self._names, strict=True):
            if other.schema.names != self.schema.names:
                raise ValueError(
                    f"{name} has the columns {', '.join(other.schema.names)}, and {self._names[0]} has "
                    f"{', '.join(self.schema.names)}"
                )
        self._batches = [batch for one in found for batch in one.batches]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self._begins = np.cumsum([0, *(sum(batch.num_rows for batch in one.batches) for one in found)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def value(self, index: int, column: str) -> Any:
        """One value as Python has it."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        batch = self._batches[part]
        return batch.column(batch.schema.get_field_index(column))[index - int(self._starts[part])].as_py()

    def column(self, name: str) -> list[Any]:
        """The parts of a whole column, as Arrow arrays."""
        return [batch.column(batch.schema.get_field_index(name)) for batch in self._batches]

    def where(self, index: int) -> str:
        """The place of a row in its file."""
        file = int(np.searchsorted(self._begins, index, side="right")) - 1
        return f"record {index - int(self._begins[file])} of {self._names[file]}"

    def __getstate__(self) -> dict[str, Any]:
        return {"_files": self._files, "_names": self._names}  # maps of memory belong to a process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


@dataclass(frozen=True)
class _Contents:
    schema: Any
    batches: list[Any]


def _read(file: Path, name: str) -> _Contents:
    import pyarrow as pa

    try:
        stream = pa.ipc.open_stream(pa.memory_map(str(file)))
        return _Contents(stream.schema, list(stream))
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} is damaged, or no Arrow file: {reason}") from error


class ArrowRecords(Source):
    """One split of a set in Arrow files.

    Args:
        fields: the fields by name, with their columns.
    """

    def __init__(self, rows: Rows, fields: Mapping[str, Field], name: str, split: str, sizes: Mapping[str, int]):
        self._rows, self._fields = rows, dict(fields)
        label = fields.get("label")
        self.info = Info(
            name=name,
            split=split,
            fields={key: field.spec for key, field in fields.items()},
            num_examples=len(rows),
            num_classes=len(label.classes) if label else None,
            class_names=_known_names(label),
            splits=dict(sizes),
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        record: Record = {"index": index}
        for name, field in self._fields.items():
            value = self._rows.value(index, field.column)
            record[name] = _READ[field.spec.kind](value, field, lambda: self.describe(index))
        return record

    @override
    def describe(self, index: int) -> str:
        return self._rows.where(index)


def _known_names(label: Field | None) -> tuple[str, ...]:
    """Names that say more than the numbers do."""
    return label.classes if label and label.classes != tuple(map(str, range(len(label.classes)))) else ()


def _image(value: Any, field: Field, where: Callable[[], str]) -> EncodedImage:
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if content is None and path:
        return EncodedImage(Path(path), f"{path} ({where()})")
    if content is None:
        raise ExampleError(f"{where()} has nothing in its column {field.column!r}")
    return EncodedImage(content, where())


def _mask(value: Any, field: Field, where: Callable[[], str]) -> Any:
    return _image(value, field, where).integers()


def _label(value: Any, field: Field, where: Callable[[], str]) -> int:
    if value is None:
        raise ExampleError(f"{where()} has nothing in its column {field.column!r}")
    if field.places is None:
        return int(value)
    if value not in field.places:
        raise ExampleError(f"{where()}: {unknown('class', str(value), field.places)}")
    return field.places[value]


def _text(value: Any, field: Field, where: Callable[[], str]) -> str:
    return "" if value is None else str(value)


_READ: dict[str, Callable[[Any, Field, Callable[[], str]], Any]] = {
    "image": _image,
    "mask": _mask,
    "label": _label,
    "text": _text,
}


def fields_of(rows: Mapping[str, Rows], renamed: Mapping[str, str], name: str) -> dict[str, Field]:
    """The fields of a set, by its columns.

    A column that is called as a field is that field. Otherwise the only column of images is `image`, and the only one
    of classes `label`. Whole numbers and text are a label where the column is called so: with as many classes as the
    largest number says, or the different texts of the training split in alphabetical order. Other images, classes and
    texts are fields of their own name; what is none of these is not read.

    Args:
        rows: of each split.
        renamed: `{field: column}` as the user says it.
        name: of the set, for messages.

    Raises:
        ValueError: no such column, one that cannot be that field, or several of which none is called so; one line.
    """
    schema = next(iter(rows.values())).schema
    described = _described(schema)
    kinds = {column: kind for column in schema.names if (kind := _kind(schema.field(column), described.get(column)))}
    chosen: dict[str, str] = {}
    for field, (usual, *others) in _FIT.items():
        if field in renamed:
            column = renamed[field]
            if column not in schema.names:
                raise ValueError(f"{name}: {field}={column}: {unknown('column', column, schema.names)}")
            if kinds.get(column) not in (usual, *others):
                raise ValueError(f"{name}: {field}={column}: a column of {schema.field(column).type} is no {field}")
        elif kinds.get(field) in (usual, *others):
            column = field
        else:
            found = [one for one, kind in kinds.items() if kind == usual and one not in renamed.values()]
            if len(found) > 1:
                raise ValueError(
                    f"{name} has several columns that may be the {field}: {', '.join(found)}; choose one, as in "
                    f"data.name='{name},{field}={found[0]}'"
                )
            if not found:
                continue
            column = found[0]
        chosen[field] = column
    if "image" not in chosen:
        raise ValueError(f"{name} has no column of images; there are: {', '.join(schema.names)}")
    fields = {field: _field(field, column, kinds[column], described, rows) for field, column in chosen.items()}
    for column, kind in kinds.items():
        if column not in chosen.values() and column not in fields and kind != "number":
            own = "label" if kind == "classes" else kind
            fields[column] = _field(own, column, kind, described, rows)
    return fields


_FIT = {"image": ("image", "mask"), "mask": ("mask", "image"), "label": ("classes", "number", "text")}
"""What a column may be to become a field; the first of them without being asked."""


def _described(schema: Any) -> dict[str, Any]:
    """What Hugging Face's `datasets` says of each column, where it wrote the file."""
    try:
        return json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}


def _kind(column: Any, described: Any) -> str | None:
    """`image`, `mask`, `classes`, `number`, `text`, or None for a column that is not read."""
    import pyarrow.types as types

    feature = described.get("_type") if isinstance(described, dict) else None
    inner = {column.type.field(i).name for i in range(column.type.num_fields)} if types.is_struct(column.type) else ()
    if feature == "Image" or types.is_binary(column.type) or types.is_large_binary(column.type) or "bytes" in inner:
        return "mask" if column.name in MASKS else "image"
    if feature == "ClassLabel" and described.get("names"):
        return "classes"
    if types.is_integer(column.type):
        return "number"
    is_text = types.is_string(column.type) or types.is_large_string(column.type)
    return "text" if is_text else None


def _field(field: str, column: str, kind: str, described: Mapping[str, Any], rows: Mapping[str, Rows]) -> Field:
    if field != "label":
        return Field(column, {"image": IMAGE, "mask": MASK, "text": FieldSpec("text")}[field])
    if kind == "classes":
        return Field(column, LABEL, tuple(described[column]["names"]))
    import pyarrow.compute as pc

    parts = {split: one.column(column) for split, one in rows.items()}
    if kind == "number":
        largest = max((pc.max(part).as_py() or 0 for part in itertools.chain(*parts.values())), default=0)
        return Field(column, LABEL, tuple(map(str, range(largest + 1))))
    training = parts.get("train") or next(iter(parts.values()))
    texts = {text for part in training for text in pc.unique(part).to_pylist() if text is not None}
    places = {text: place for place, text in enumerate(sorted(texts))}
    return Field(column, LABEL, tuple(places), places)
