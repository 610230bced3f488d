"""What a data set is: a random-access sequence of records, and what is known about them.

A record is a dict of named values. `info.fields` says the kind of each, and what is known of its shape and type:

    image      uint8 [H, W, C] (0 to 255), float32 [H, W, C] (0 to 1), or an `EncodedImage` not decoded yet
    views      images of one size, [V, H, W, C] or a list of them, of one scene by several cameras
    video      images of one size, [T, H, W, C] or a list of them, one after another
    mask       integer [H, W], one class a pixel; 255 where there is no truth
    depth      float [H, W], metres; 0 or not finite where there is no truth
    disparity  float [H, W], pixels from a place in one picture of a stereo pair to its place in the other; 0 or not
               finite where there is no truth
    flow       float32 [H, W, 2], displacement (dx, dy) in pixels
    heatmap    float [H, W, C], a value a pixel
    boxes      float32 [n, 4], (x_min, y_min, x_max, y_max) in pixels; the image spans 0 to W and 0 to H
    points     float32 [n, 2+], (x, y, anything) in pixels
    camera     float [3, 3], from camera coordinates to (x, y, 1) in pixels; or [V, 3, 3], one for each view
    label      int, 0 <= label < info.num_classes
    array      numbers of any one shape: voxels [V], sensors [T, C], poses
    tokens     int [length]
    text       str

and every record has `index`, its place in the source.

A geometric transform moves all that has a height and a width alike. What becomes of the values:

    image, views, video, heatmap, flow   mixed with their neighbours; vectors of flow turn and stretch with the picture
    mask, depth, disparity               taken from the nearest pixel; disparity is stretched with the width
    boxes, points, camera                mapped exactly: a camera K becomes A K with the map of pixels A
    label, array, tokens, text           never touched
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Integer
from PIL import Image, UnidentifiedImageError
from typing_extensions import override

from data.kinds import PICTURES, FieldSpec, known, specs
from data.pixels import TURNS, Reading, eight_bit, orientation

Record = dict[str, Any]


# What Pillow warns of, it says once in each process, without the name of the file; what cannot be read is an error.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class ExampleError(ValueError):
    """One example cannot be used; the message names it. `data.on_error` decides what happens."""


@dataclass(frozen=True)
class Info:
    """What is known about a source before a record is read.

    `fields` maps the name of each field to a `FieldSpec`; a kind alone, such as `"image"`, is taken for one of which no
    more is known. `splits` maps the name of every split of the set to its number of examples; `notes` are sentences to
    say before the set is used.
    """

    name: str
    split: str
    fields: Mapping[str, FieldSpec]
    num_examples: int
    num_classes: int | None = None
    class_names: tuple[str, ...] = ()
    splits: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", specs(self.fields, self.name))

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Info:
        """What `dataclasses.asdict` and JSON made of it.

        Notes from before fields had shapes have their kinds alone, and the shape of the image beside them.
        """
        known: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        shape = known.pop("image_shape", None)
        fields = {
            name: FieldSpec(**spec) if isinstance(spec, Mapping) else FieldSpec(spec)
            for name, spec in known["fields"].items()
        }
        if shape and "image" in fields:
            fields["image"] = replace(fields["image"], shape=shape)
        return cls(**{**known, "fields": fields})

    @property
    def kinds(self) -> dict[str, str]:
        """The kind of each field, by its name."""
        return {name: spec.kind for name, spec in self.fields.items()}


class Source(Protocol):
    """A set of examples that can be read in any order, from any thread and, after pickling, from any process."""

    info: Info

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def describe(self, index: int) -> str:
        """Names example `index` for a person: its file, or the record of its set."""
        ...


class EncodedImage:
    """An image still in its file or in its compressed bytes; `np.asarray(image)` decodes it to uint8 [H, W, C]."""

    def __init__(self, content: bytes | Path, name: str, mode: str = "RGB", reading: Reading | None = None):
        self.content, self.name, self.mode, self.reading = content, name, mode, reading or Reading()
        self._opened: Image.Image | None = None

    def _open(self) -> Image.Image:
        if self._opened is None:
            content = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
            if not content:
                raise OSError("it has 0 bytes")
            self._opened = Image.open(io.BytesIO(content))
        return self._opened

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), from the header alone. Raises ExampleError with the name."""
        try:
            width, height = self._open().size
            return (height, width) if self._turned() > 4 else (width, height)
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error ...
            raise self._failure(error) from error

    def decode(self, least: tuple[int, int] | None = None) -> Image.Image:
        """Decodes any depth (`data.pixels`) to Pillow's mode "RGB" or "L". A JPEG may come 2, 4 or 8 times smaller, but
        with neither side below `least` = (width, height), which costs a fraction of the time.

        Raises ExampleError with the name.
        """
        try:
            turned = self._turned()
            opened, self._opened = self._open(), None  # draft() changes it for good
            if least is not None:
                opened.draft(self.mode, least[::-1] if turned > 4 else least)
            if opened.mode == "F" and not np.isfinite(np.asarray(opened)).all():
                raise OSError("it holds NaN or infinite values")
            image = eight_bit(opened, self.mode, self.reading)
            return image.transpose(TURNS[turned]) if turned in TURNS else image
        except Exception as error:
            raise self._failure(error) from error

    def integers(self) -> Integer[np.ndarray, "H W"]:
        """The values as they are stored, of any depth and not scaled: a mask. Raises ExampleError with the name."""
        try:
            opened, self._opened = self._open(), None
            if opened.mode not in ("1", "L", "P") and not opened.mode.startswith("I"):
                raise OSError(f"mode {opened.mode}: a mask has one channel of integers")
            return np.asarray(opened) * 1 if opened.mode == "1" else np.asarray(opened)
        except Exception as error:
            raise self._failure(error) from error

    def read_as(self, reading: Reading) -> EncodedImage:
        """The same image, read in another way."""
        return EncodedImage(self.content, self.name, self.mode, reading)

    def _turned(self) -> int:
        return orientation(self._open()) if self.reading.exif_rotation else 1

    def _failure(self, error: Exception) -> ExampleError:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
        return ExampleError(f"cannot decode image {self.name}: {reason or type(error).__name__}")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = np.asarray(self.decode())
        array = array[..., None] if array.ndim == 2 else array
        return array if dtype is None else array.astype(dtype)


class ArraySource(Source):
    """Records kept in memory as arrays whose first axis counts examples.

    Serves the digits, generated sets and tests: `ArraySource({"image": ..., "label": ...}, fields={"image": "image",
    "label": "label"}, class_names=("a", "b"))`. A column may be a list where examples differ in shape. Shapes and types
    of the fields are those of the columns, and need not be said.
    """

    def __init__(
        self,
        columns: Mapping[str, Sequence[Any] | np.ndarray],
        *,
        fields: Mapping[str, str | FieldSpec],
        name: str = "arrays",
        split: str = "train",
        num_classes: int | None = None,
        class_names: Sequence[str] = (),
        splits: Mapping[str, int] | None = None,
    ):
        lengths = {key: len(column) for key, column in columns.items()}
        if set(lengths) != set(fields) or len(set(lengths.values())) != 1:
            raise ValueError(f"columns {lengths} of {name!r} must be the fields {sorted(fields)}, all of one length")
        self._columns = dict(columns)
        count = next(iter(lengths.values()))
        found = {}
        for key, spec in specs(fields, name).items():
            try:
                found[key] = known(spec, columns[key])
            except ValueError as error:
                raise ValueError(f"field {key!r} of {name!r}: {error}") from None
        self.info = Info(
            name=name,
            split=split,
            fields=found,
            num_examples=count,
            num_classes=num_classes if num_classes is not None else len(class_names) or None,
            class_names=tuple(class_names),
            splits=dict(splits) if splits else {split: count},
        )

    def __len__(self) -> int:
        return self.info.num_examples

    def __getitem__(self, index: int) -> Record:
        return {"index": index, **{key: column[index] for key, column in self._columns.items()}}

    @override
    def describe(self, index: int) -> str:
        return f"example {index} of {self.info.name} {self.info.split}"


class Selection(Source):
    """Some examples of another source, in the order of `indices`: a slice of a split, or several splits joined."""

    def __init__(self, parts: Sequence[tuple[Source, range]], split: str):
        self._parts = tuple(parts)
        self._starts = np.cumsum([0, *(len(chosen) for _, chosen in parts)])
        first = parts[0][0].info
        self.info = replace(first, split=split, num_examples=int(self._starts[-1]))

    def _locate(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {self.info.name} {self.info.split}, which has {len(self)} examples")
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        source, chosen = self._parts[part]
        return source, chosen[index - int(self._starts[part])]

    def __len__(self) -> int:
        return self.info.num_examples

    def __getitem__(self, index: int) -> Record:
        source, inner = self._locate(index)
        return {**source[inner], "index": index}

    @override
    def describe(self, index: int) -> str:
        source, inner = self._locate(index)
        return source.describe(inner)


class ReadAs(Source):
    """Another source whose images are read in a certain way, those that are arrays of more than 8 bits too."""

    def __init__(self, source: Source, reading: Reading):
        self._source, self._reading = source, reading
        fields = {
            name: replace(spec, dtype="float32") if reading.pixel_range and _is_deep(spec) else spec
            for name, spec in source.info.fields.items()
        }
        self.info = replace(source.info, fields=fields)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        record = dict(self._source[index])
        for name, kind in self.info.kinds.items():
            value = record[name]
            if kind in PICTURES and isinstance(value, list | tuple):
                record[name] = [self._read(image) for image in value]
            elif kind in PICTURES or isinstance(value, EncodedImage):
                record[name] = self._read(value)
        return record

    def _read(self, value: Any) -> Any:
        if isinstance(value, EncodedImage):
            return value.read_as(self._reading)
        if not self._reading.pixel_range or np.asarray(value).dtype == np.uint8:
            return value
        black, white = self._reading.pixel_range
        unit = (np.asarray(value, np.float64) - black) / (white - black)
        return np.clip(unit, 0, 1).astype(np.float32)

    @override
    def describe(self, index: int) -> str:
        return self._source.describe(index)


def _is_deep(spec: FieldSpec) -> bool:
    return spec.kind in PICTURES and spec.dtype not in (None, "uint8")


class DecodedOnce(Source):
    """Keeps the records of another source in memory after their first use, images decoded to uint8 arrays.

    Each process fills its own memory as it reads; pickling (to a worker) leaves the memory behind.
    """

    def __init__(self, source: Source):
        self._source, self.info = source, source.info
        self._records: dict[int, Record] = {}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        record = self._records.get(index)
        if record is None:
            record = {key: _decoded(value) for key, value in self._source[index].items()}
            self._records[index] = record
        return dict(record)

    @override
    def describe(self, index: int) -> str:
        return self._source.describe(index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_records": {}}


def _decoded(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_decoded(one) for one in value]
    return np.asarray(value) if isinstance(value, EncodedImage) else value
