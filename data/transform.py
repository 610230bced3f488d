"""What a transform is: a callable that changes an example in place, with all its randomness from one generator."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
from PIL import Image
from typing_extensions import override

from data.source import EncodedImage, ExampleError, Record
from data.warp import Fill, Warp, warp_field

Size = tuple[int, int]  # (width, height)


@dataclass
class Example:
    """A record on its way through the transforms, and the kinds of its fields."""

    values: Record
    kinds: dict[str, str]

    def eight_bit(self, name: str, what: str) -> Image.Image:
        """The image `name` as a Pillow image. Raises ValueError if it is a float array already."""
        value = self.values[name]
        if isinstance(value, EncodedImage):
            value = value.decode()
        if not isinstance(value, Image.Image):
            raise ValueError(f"transform {what!r} needs an 8-bit image: put it before 'normalize' (field {name!r})")
        return value


@dataclass(frozen=True)
class Transform:
    """Base of all transforms. `on` restricts one to some fields; by default it acts on every field it applies to."""

    on: str | tuple[str, ...] | None = field(default=None, kw_only=True)

    def __call__(self, example: Example, rng: np.random.Generator) -> None:
        """Changes `example` in place, drawing only from `rng`."""
        raise NotImplementedError

    def kinds_after(self, kinds: dict[str, str]) -> dict[str, str]:
        """The fields that leave this transform, given those that enter it."""
        return kinds

    def pixel_scale(self, field: str) -> tuple[np.ndarray, np.ndarray] | None:
        """(mean, std) for a transform that makes images `(pixel - mean) / std`, pixels from 0 to 1; else None."""
        del field
        return None

    def acts_on(self, name: str) -> bool:
        """Whether `on` allows a field."""
        return self.on is None or name in ((self.on,) if isinstance(self.on, str) else self.on)

    def fields(self, example: Example, *kinds: str) -> list[str]:
        """The fields of these kinds (all, if none is given) that this transform acts on."""
        return [name for name, kind in example.kinds.items() if (not kinds or kind in kinds) and self.acts_on(name)]


@dataclass(frozen=True)
class GeometricTransform(Transform):
    """A transform that draws one `Warp` for a record and applies it to all its fields.

    Where images or masks differ in size, the same draws are made for each; boxes and points follow the field `image`,
    or else the first one. `fill` is the colour, 0 to 255, of pixels from outside the image; by default the mean of
    the set.
    """

    fill: Fill | None = field(default=None, kw_only=True)

    def warp(self, width: int, height: int, rng: np.random.Generator) -> Warp | None:
        """Draws the map for an image of this size in pixels; None leaves it as it is."""
        raise NotImplementedError

    def warps(self, sizes: Mapping[str, Size], leader: str, rng: np.random.Generator) -> dict[str, Warp | None]:
        """The map for each of the fields that have a size; `leader` is the one that the others follow."""
        before = rng.bit_generator.state
        drawn = {sizes[leader]: self.warp(*sizes[leader], rng)}
        for size in sizes.values():
            if size not in drawn:
                rng.bit_generator.state = before
                drawn[size] = self.warp(*size, rng)
        return {name: drawn[size] for name, size in sizes.items()}

    @override
    def __call__(self, example: Example, rng: np.random.Generator) -> None:
        images = self.fields(example, "image")
        sizes = {name: image_size(example.values[name]) for name in self.fields(example, "image", "mask", "flow")}
        if not sizes:
            raise ValueError(f"{type(self).__name__} finds no image among the fields {sorted(example.kinds)}")
        leader = "image" if "image" in images else [*images, *sizes][0]
        try:
            warps = self.warps(sizes, leader, rng)
        except ExampleError as error:
            raise ExampleError(f"example {example.values.get('index')}: {error}") from error
        for name in self.fields(example):
            warp = warps[name if name in warps else leader]
            if warp is not None:
                example.values[name] = warp_field(warp, example.kinds[name], example.values[name], self.fill or 0.0)


@dataclass(frozen=True)
class CroppingTransform(GeometricTransform):
    """A geometric transform whose parameters are numbers of pixels, such as a crop.

    They are pixels of the field `image` (or of the first image). Where another image or mask is k times as large, it
    gets k times of each, at the same place: the input and the target of super-resolution stay a pair. The draws are
    made on the smallest, so every place falls on whole pixels of all.
    """

    in_pixels: ClassVar[tuple[str, ...]] = ("size",)

    @override
    def warps(self, sizes: Mapping[str, Size], leader: str, rng: np.random.Generator) -> dict[str, Warp | None]:
        smallest = min(sizes, key=lambda name: sizes[name][0] * sizes[name][1])
        width, height = sizes[smallest]
        factors = {}
        for name, size in sizes.items():
            factors[name] = size[0] // width
            if size != (width * factors[name], height * factors[name]):
                raise ExampleError(
                    f"{self._spelling} cuts {smallest!r} of {width}x{height} and {name!r} of {size[0]}x{size[1]} at "
                    "one place, but the second is not the same whole number of times as wide and as high; give each "
                    f"a {self._spelling} or resize of its own (on={name!r})"
                )
        warp = self._divided(factors[leader], leader, smallest).warp(width, height, rng)
        assert warp is not None  # what cuts always does something
        return {name: warp if factor == 1 else warp.enlarged(factor) for name, factor in factors.items()}

    def _divided(self, factor: int, leader: str, smallest: str) -> Self:
        """The transform in pixels of an image that is `factor` times smaller."""
        if factor == 1:
            return self
        values = {}
        for name in self.in_pixels:
            value = getattr(self, name)
            if any(part % factor for part in (value if isinstance(value, tuple) else (value,))):
                raise ValueError(
                    f"{name}={value} of {self._spelling}: must be a multiple of {factor}, as {leader!r} is {factor} "
                    f"times as large as {smallest!r}"
                )
            values[name] = tuple(part // factor for part in value) if isinstance(value, tuple) else value // factor
        return replace(self, **values)

    @property
    def _spelling(self) -> str:
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()


def image_size(value: Any) -> Size:
    """(width, height) of an image in any of its forms, or of a mask or flow field."""
    if isinstance(value, (Image.Image, EncodedImage)):
        return value.size
    return value.shape[1], value.shape[0]
