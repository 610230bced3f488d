"""The kinds of fields that a record may have, and what is known of a field before a record is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from naming import unknown

KINDS: Mapping[str, tuple[int, ...]] = {
    "image": (3,),
    "label": (),
    "mask": (2,),
    "boxes": (2,),
    "points": (2,),
    "flow": (3,),
    "depth": (2,),
    "disparity": (2,),
    "heatmap": (3,),
    "views": (4,),
    "video": (4,),
    "camera": (2, 3),
    "array": (),
    "tokens": (1,),
    "text": (),
}
"""How many axes a value of each kind may have; any number where there is none. `data/source.py` says what they are."""

PICTURES = ("image", "views", "video")
"""Kinds made of images, whose colours transforms change."""
SIZED = (*PICTURES, "mask", "flow", "depth", "disparity", "heatmap")
"""Kinds with a height and a width in pixels."""
MOVED = (*SIZED, "boxes", "points", "camera")
"""Kinds that geometric transforms act on."""
_NUMBERS = {"depth": "f", "disparity": "f", "heatmap": "f", "camera": "f", "mask": "iub", "tokens": "iu"}
_NUMBERS_IN_WORDS = {"f": "floating point", "iub": "integers", "iu": "integers"}


def spelled_size(kind: str | None, shape: tuple[int, ...]) -> str:
    """Height and width of one example, as in `160x224`; the whole shape where a field of this kind has none."""
    first = 1 if kind in ("views", "video") else 0
    return "x".join(map(str, shape[first : first + 2] if kind in SIZED else shape))


def without_size(kind: str | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one example without height and width; the whole shape where a field of this kind has none."""
    if kind not in SIZED:
        return shape
    first = 1 if kind in ("views", "video") else 0
    return shape[:first] + shape[first + 2 :]


SHAPED_BY = {
    "image": "channels are changed by 'to_rgb' or 'to_gray(1)'; config.model.options.channels is the model's",
    "tokens": "the length of 'tokenize(length)'",
    "text": "'tokenize(length)' gives one length",
    "boxes": "'pad_rows(count)' gives one number of rows",
    "points": "'pad_rows(count)' gives one number of rows",
}
"""What makes the shape of a field of each kind, where it is not its height and width."""


def typed_by(kind: str | None, value: np.ndarray, wanted: np.dtype) -> str:
    """What makes the type that is wanted of a value `[1, ...]`, as the end of a message; "" where that is not known."""
    picture = kind in PICTURES or (kind is None and value.ndim == 4)
    if not picture or np.uint8 not in (value.dtype, wanted):
        return ""
    return "; leave out 'normalize'" if wanted == np.uint8 else "; add 'normalize' or 'value_range(0, 1)'"


def misfit(kind: str, axes: int, dtype: Any) -> str:
    """Why a value with so many axes and this type of numbers is none of its kind; "" if it may be one."""
    if KINDS[kind] and axes not in KINDS[kind]:
        return f"has {axes} axes, and a field of kind {kind!r} has {' or '.join(map(str, KINDS[kind]))}"
    if dtype is not None and kind in _NUMBERS and np.dtype(dtype).kind not in _NUMBERS[kind]:
        return f"is {np.dtype(dtype).name}, and a field of kind {kind!r} holds {_NUMBERS_IN_WORDS[_NUMBERS[kind]]}"
    return ""


@dataclass(frozen=True)
class FieldSpec:
    """What is known of a field of a source.

    Args:
        kind: one of `KINDS`.
        shape: of the value in one record, decoded, with None for what varies; None where nothing is known.
        dtype: the name of its type, or anything that NumPy takes for one; None where it is not known or varies.

    Raises:
        ValueError: there is no such kind, or it has no such values; one line.
    """

    kind: str
    shape: tuple[int | None, ...] | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(unknown("kind", self.kind, KINDS))
        if self.dtype is not None:
            try:
                object.__setattr__(self, "dtype", np.dtype(self.dtype).name)
            except TypeError:
                raise ValueError(f"dtype {self.dtype!r} is no type of numbers, such as 'float32'") from None
        if self.shape is not None:
            object.__setattr__(self, "shape", tuple(self.shape))
            if reason := misfit(self.kind, len(self.shape), self.dtype):
                raise ValueError(f"it {reason}")

    @property
    def bytes(self) -> int | None:
        """What the value of one record takes in memory; None where it varies or is not known."""
        if self.shape is None or self.dtype is None:
            return None
        sides = [side for side in self.shape if side is not None]
        return math.prod(sides) * np.dtype(self.dtype).itemsize if len(sides) == len(self.shape) else None


def specs(fields: Mapping[str, str | FieldSpec], name: str) -> dict[str, FieldSpec]:
    """The fields of the source `name` as specs; a kind alone stands for a field of which no more is known.

    Raises:
        ValueError: there is no such kind; one line with the field and the source.
    """
    found = {}
    for field, spec in fields.items():
        try:
            found[field] = spec if isinstance(spec, FieldSpec) else FieldSpec(spec)
        except ValueError as error:
            raise ValueError(f"field {field!r} of {name!r}: {error}") from None
    return found


def known(spec: FieldSpec, column: Any) -> FieldSpec:
    """The spec with shape and type of a column of values, where it does not say them itself.

    Raises:
        ValueError: the column has other ones than the spec says, or none that its kind has; one line.
    """
    if isinstance(column, np.ndarray):
        shapes, dtypes = {column.shape[1:]}, {column.dtype}
    elif all(isinstance(value, np.ndarray | np.number | int | float) for value in column):
        shapes = {np.shape(value) for value in column}
        dtypes = {np.asarray(value).dtype for value in column}
    else:
        return spec
    shape: tuple[int | None, ...] | None = None
    if len({len(one) for one in shapes}) == 1:
        shape = tuple(sides[0] if len(set(sides)) == 1 else None for sides in zip(*shapes, strict=True))
    dtype = dtypes.pop().name if len(dtypes) == 1 else None
    found = FieldSpec(spec.kind, shape, dtype)
    if spec.shape is not None and shape is not None:
        same = len(spec.shape) == len(shape)
        if not same or any(None not in (a, b) and a != b for a, b in zip(spec.shape, shape, strict=True)):
            raise ValueError(f"its shape is {shape}, and its spec says {spec.shape}")
    if None not in (spec.dtype, dtype) and spec.dtype != dtype:
        raise ValueError(f"it is {dtype}, and its spec says {spec.dtype}")
    return FieldSpec(spec.kind, spec.shape or found.shape, spec.dtype or found.dtype)
