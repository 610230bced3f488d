"""Moving pixels: resizing, cropping, flipping, padding. A size is one number (square) or (height, width)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from typing_extensions import override

from data.kinds import MOVED
from data.transform import CroppingTransform, Example, GeometricTransform
from data.warp import Flip, Resample, Warp, Window, check_interpolation
from naming import unknown

Size = int | tuple[int, int]


def _check_size(size: Size) -> None:
    if min(_width_height(size)) < 1:
        raise ValueError(f"a size must be at least 1 pixel, got {size}")


def _width_height(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[1], size[0])


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value and value not in choices:
        raise ValueError(unknown(what, value, choices))


LIKE = ("timm", "torchvision", "transformers")
"""Libraries whose pixels a transform can give to the bit."""
FIT = ("stretch", "cover", "contain")


@dataclass(frozen=True)
class Resize(GeometricTransform):
    """Resizes the shorter side to `size` and keeps the shape, or resizes to exactly (height, width).

    `fit` says it for one number (a square) and two alike: "stretch" comes to exactly this size; the others keep the
    shape, "cover" with the smallest image that covers this size, "contain" with the largest that fits in it. Every
    image and mask of a record comes to its size, whatever its own was.

    `like` gives the pixels of a library to the bit: the longer side is truncated and not rounded, a large JPEG is
    decoded whole (`EncodedImage.decode`), and with timm two numbers are covered and not stretched to.
    """

    size: Size
    interpolation: str = "bicubic"
    fit: str = field(default="", kw_only=True)
    like: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        _check_size(self.size)
        check_interpolation(self.interpolation)
        _check_choice("fit of 'resize':", self.fit, FIT)
        _check_choice("like of 'resize':", self.like, LIKE)

    @override
    def warp(self, width: int, height: int, rng: np.random.Generator) -> Warp | None:
        target = self._target(width, height)
        if target == (width, height):
            return None
        return Resample(target, (0, 0, width, height), self.interpolation, whole=bool(self.like))

    def _target(self, width: int, height: int) -> tuple[int, int]:
        fit = self.fit or ("" if isinstance(self.size, int) else "cover" if self.like == "timm" else "stretch")
        if fit == "stretch":
            return _width_height(self.size)
        if fit:
            across, down = _width_height(self.size)
            ratio = (min if fit == "cover" else max)(height / down, width / across)
            return max(round(width / ratio), 1), max(round(height / ratio), 1)
        assert isinstance(self.size, int)
        if self.like:
            shorter = min(width, height)
            return int(self.size * width / shorter), int(self.size * height / shorter)
        scale = self.size / min(width, height)
        return max(round(width * scale), self.size), max(round(height * scale), self.size)


@dataclass(frozen=True)
class CenterCrop(CroppingTransform):
    """Cuts the middle; an image smaller than that is padded with the mean colour.

    Where the middle lies between two pixels, `like` says which one it is, and how much is padded on which side:
    "timm", "torchvision" (the same) or "transformers". They pad with black.
    """

    size: Size
    like: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        _check_size(self.size)
        _check_choice("like of 'center_crop':", self.like, LIKE)
        if self.like and self.fill is None:
            object.__setattr__(self, "fill", 0.0)

    @override
    def warp(self, width: int, height: int, rng: np.random.Generator) -> Warp:
        across, down = _width_height(self.size)
        return Window((across, down), (self._start(width, across), self._start(height, down)))

    def _start(self, size: int, wanted: int) -> int:
        """The first pixel of the window; -1 where one pixel of padding comes before."""
        if self.like == "transformers":
            return (size - wanted) // 2
        if self.like and size < wanted:
            return -((wanted - size) // 2)
        return round((size - wanted) / 2)


@dataclass(frozen=True)
class RandomCrop(CroppingTransform):
    """Pads every side by `padding`, then cuts at random (CIFAR; DeiT-III with `padding=4, mirror=True`)."""

    in_pixels: ClassVar[tuple[str, ...]] = ("size", "padding")

    size: Size
    padding: int = 0
    mirror: bool = False

    def __post_init__(self) -> None:
        _check_size(self.size)

    @override
    def warp(self, width: int, height: int, rng: np.random.Generator) -> Warp:
        across, down = _width_height(self.size)
        left = _start(rng, width, across, self.padding)
        return Window((across, down), (left, _start(rng, height, down, self.padding)), self.mirror)


def _start(rng: np.random.Generator, size: int, wanted: int, padding: int) -> int:
    """A window's first pixel, uniform over the padded side; the middle if the side is too short."""
    room = size + 2 * padding - wanted
    return int(rng.integers(room + 1)) - padding if room >= 0 else (size - wanted) // 2


@dataclass(frozen=True)
class RandomResizedCrop(CroppingTransform):
    """Cuts a rectangle of random area and aspect and resizes it (Szegedy et al., arXiv:1409.4842, section 6).

    `scale` bounds the area as a share of the image's, `ratio` width over height, uniform in its logarithm. After ten
    rectangles that do not fit, the largest middle one within `ratio` is taken.
    """

    size: Size
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        _check_size(self.size)
        check_interpolation(self.interpolation)

    @override
    def warp(self, width: int, height: int, rng: np.random.Generator) -> Warp:
        for _ in range(10):
            area = width * height * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < across <= width and 0 < down <= height:
                left, top = int(rng.integers(width - across + 1)), int(rng.integers(height - down + 1))
                break
        else:
            across = min(width, max(round(height * self.ratio[1]), 1))
            down = min(height, max(round(width / self.ratio[0]), 1))
            left, top = (width - across) // 2, (height - down) // 2
        box = (left, top, left + across, top + down)
        return Resample(_width_height(self.size), box, self.interpolation)


@dataclass(frozen=True)
class InceptionCrop(RandomResizedCrop):
    """`random_resized_crop` with big_vision's settings: at least 5% of the area, bilinear."""

    scale: tuple[float, float] = (0.05, 1.0)
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class RandomFlip(GeometricTransform):
    """Mirrors left and right with this probability.

    `swap` = (a, b, c, d, ...) then exchanges the fields a and b, c and d, and so on: a mirrored stereo pair is one only
    with its pictures exchanged, since what lay further left in the right picture lies further right in its mirror
    image. The disparity that belongs to the new left picture is the mirrored one of the old right picture, so a record
    with disparity takes those of both pictures, exchanged as well, and is refused otherwise.
    """

    probability: float = 0.5
    swap: tuple[str, ...] = ()

    @override
    def warp(self, width: int, height: int, rng: np.random.Generator) -> Warp | None:
        return Flip((width, height)) if rng.random() < self.probability else None

    def __post_init__(self) -> None:
        if len(self.swap) % 2 or len(set(self.swap)) < len(self.swap):
            raise ValueError(f"swap of 'flip' must be pairs of fields, such as ('left', 'right'), got {self.swap}")

    @override
    def __call__(self, example: Example, rng: np.random.Generator) -> None:
        if any(self.move(example, rng).values()):
            example.values.update({a: example.values[b] for a, b in self._exchanged})

    @property
    def _exchanged(self) -> list[tuple[str, str]]:
        pairs = list(zip(self.swap[::2], self.swap[1::2], strict=True))
        return [*pairs, *((b, a) for a, b in pairs)]

    @override
    def refusal(self, kinds: Mapping[str, str]) -> str | None:
        for name in self.swap:
            if name not in kinds:
                return f"cannot swap: {unknown('field', name, kinds)}"
            if kinds[name] not in MOVED or not self.acts_on(name):
                return f"cannot swap {name!r} ({kinds[name]}), which it does not mirror"
        for a, b in self._exchanged:
            if kinds[a] != kinds[b]:
                return f"cannot swap {a!r} ({kinds[a]}) with {b!r} ({kinds[b]})"
        alone = [name for name, kind in kinds.items() if kind == "disparity" and name not in self.swap]
        if alone:
            return (
                f"mirrors pictures, and {alone[0]!r} (disparity) holds only for the pair as it is: give the fields to "
                "exchange, with the disparity of both pictures, as swap=('left', 'right', 'left_disparity', "
                "'right_disparity')"
            )
        return super().refusal(kinds)


@dataclass(frozen=True)
class Pad(CroppingTransform):
    """Adds `amount` pixels on every side, of the mean colour or mirrored."""

    in_pixels: ClassVar[tuple[str, ...]] = ("amount",)

    amount: int
    mirror: bool = False

    @override
    def warp(self, width: int, height: int, rng: np.random.Generator) -> Warp:
        return Window((width + 2 * self.amount, height + 2 * self.amount), (-self.amount, -self.amount), self.mirror)
