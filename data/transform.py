"""What a transform is: a callable that changes an example in place, with all its randomness from one generator."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from typing_extensions import override

from data.source import EncodedImage, Record
from data.warp import Fill, Warp, warp_field


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

    Where several images differ in size, the same draws are made for each, and the other fields follow the first image.
    `fill` is the colour, 0 to 255, of pixels from outside the image; by default the mean of the set.
    """

    fill: Fill | None = field(default=None, kw_only=True)

    def warp(self, width: int, height: int, rng: np.random.Generator) -> Warp | None:
        """Draws the map for an image of this size in pixels; None leaves it as it is."""
        raise NotImplementedError

    @override
    def __call__(self, example: Example, rng: np.random.Generator) -> None:
        sizes = {name: image_size(example.values[name]) for name in self.fields(example, "image")}
        if not sizes:
            sizes = {name: image_size(example.values[name]) for name in self.fields(example, "mask", "flow")}
        if not sizes:
            raise ValueError(f"{type(self).__name__} finds no image among the fields {sorted(example.kinds)}")
        leader, *others = sizes
        before = rng.bit_generator.state if others else {}
        warps = {sizes[leader]: self.warp(*sizes[leader], rng)}
        for name in others:
            if sizes[name] not in warps:
                rng.bit_generator.state = before
                warps[sizes[name]] = self.warp(*sizes[name], rng)
        for name in self.fields(example):
            warp = warps[sizes.get(name, sizes[leader])]
            if warp is not None:
                example.values[name] = warp_field(warp, example.kinds[name], example.values[name], self.fill or 0.0)


def image_size(value: Any) -> tuple[int, int]:
    """(width, height) of an image in any of its forms, or of a mask or flow field."""
    if isinstance(value, (Image.Image, EncodedImage)):
        return value.size
    return value.shape[1], value.shape[0]
