"""What a transform is: a callable that changes an example in place, with all its randomness from one generator."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
from PIL import Image
from typing_extensions import override

from data.kinds import MOVED, PICTURES, SIZED
from data.source import EncodedImage, ExampleError, Record
from data.warp import Fill, Warp, warp_field

Size = tuple[int, int]  # (width, height)


@dataclass
class Example:
    """A record on its way through the transforms, and the kinds of its fields."""

    values: Record
    kinds: dict[str, str]

    def change(self, name: str, function: Callable[[Any], Any]) -> None:
        """Applies a function to an image, or to every image of views or a video."""
        value = self.values[name]
        self.values[name] = [function(image) for image in value] if isinstance(value, list) else function(value)

    def recolour(self, name: str, what: str, function: Callable[[Image.Image], Image.Image]) -> None:
        """The same for a function of Pillow images. Raises ValueError, with `what` as its name, for float arrays."""

        def on_eight_bits(value: Any) -> Image.Image:
            if isinstance(value, EncodedImage):
                value = value.decode()
            if not isinstance(value, Image.Image):
                raise ValueError(f"transform {what!r} needs an 8-bit image: put it before 'normalize' (field {name!r})")
            return function(value)

        self.change(name, on_eight_bits)


@dataclass(frozen=True)
class Transform:
    """Base of all transforms. `on` restricts one to some fields; by default it acts on every field it applies to.

    `acts` are the kinds of fields that it can act on; None says nothing, and nothing is refused then.
    """

    acts: ClassVar[tuple[str, ...] | None] = None

    on: str | tuple[str, ...] | None = field(default=None, kw_only=True)

    def __call__(self, example: Example, rng: np.random.Generator) -> None:
        """Changes `example` in place, drawing only from `rng`."""
        raise NotImplementedError

    def kinds_after(self, kinds: dict[str, str]) -> dict[str, str]:
        """The fields that leave this transform, given those that enter it."""
        return kinds

    def refusal(self, kinds: Mapping[str, str]) -> str | None:
        """Why it cannot act on a record with these fields, to be read after its name; None if it can."""
        if self.acts is not None and self.on is not None:
            for name in (self.on,) if isinstance(self.on, str) else self.on:
                if kinds[name] not in self.acts:
                    return f"does not act on {kinds[name]} (on={name!r}), but on {', '.join(self.acts) or 'none'}"
        return None

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
class Layout:
    """The sizes of what a geometric transform acts on, and whose pixels the coordinates of other fields count.

    Boxes, points and a camera count those of the leader, the field `image` or else the first picture; a camera for each
    view, `[V, 3, 3]`, counts those of the views.
    """

    sizes: dict[str, Size]
    leader: str
    of_cameras: dict[str, str]

    @classmethod
    def of(cls, transform: Transform, example: Example) -> Self:
        """That of the fields of `example` that `transform` acts on. Raises ValueError if none of them has a size."""
        pictures = transform.fields(example, *PICTURES)
        sizes = {name: image_size(example.values[name]) for name in transform.fields(example, *SIZED)}
        if not sizes:
            raise ValueError(f"{type(transform).__name__} finds no image among the fields {sorted(example.kinds)}")
        leader = "image" if "image" in pictures else [*pictures, *sizes][0]
        views = transform.fields(example, "views")
        cameras = [name for name in transform.fields(example, "camera") if np.ndim(example.values[name]) == 3]
        return cls(sizes, leader, {name: views[0] for name in cameras if views})

    def followed(self, name: str) -> str:
        """The field whose map is that of the field `name`: itself if it has a size."""
        return name if name in self.sizes else self.of_cameras.get(name, self.leader)


@dataclass(frozen=True)
class GeometricTransform(Transform):
    """A transform that draws one `Warp` for a record and applies it to all its fields.

    Where images or masks differ in size, the same draws are made for each; what has no size follows one of them
    (`Layout`). `fill` is the colour, 0 to 255, of pixels from outside the image; by default the mean of
    the set.
    """

    acts: ClassVar[tuple[str, ...] | None] = MOVED

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
        self.move(example, rng)

    def move(self, example: Example, rng: np.random.Generator) -> Mapping[str, Warp | None]:
        """Draws the maps, moves all fields by them, and returns them by the name of each field with a size."""
        layout = Layout.of(self, example)
        try:
            warps = self.warps(layout.sizes, layout.leader, rng)
        except ExampleError as error:
            raise ExampleError(f"example {example.values.get('index')}: {error}") from error
        for name in self.fields(example, *MOVED):
            warp = warps[layout.followed(name)]
            if warp is not None:
                example.values[name] = warp_field(warp, example.kinds[name], example.values[name], self.fill or 0.0)
        return warps


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
    """(width, height) of an image in any of its forms, of the first of several, or of a map such as a mask."""
    if isinstance(value, list):
        return image_size(value[0])
    if isinstance(value, (Image.Image, EncodedImage)):
        return value.size
    return value.shape[1], value.shape[0]
