"""Transforms that change the values of pixels and not their place."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Shaped
from PIL import Image, ImageEnhance
from typing_extensions import override

from data.kinds import PICTURES
from data.source import EncodedImage
from data.transform import Example, Transform

Statistics = float | tuple[float, ...]


@dataclass(frozen=True)
class ColourTransform(Transform):
    """A transform of pictures: all images of views and of a video are changed alike, by the same draws."""

    acts: ClassVar[tuple[str, ...] | None] = PICTURES


@dataclass(frozen=True)
class ToRgb(ColourTransform):
    """Gives grey images three equal channels."""

    @override
    def __call__(self, example: Example, rng: np.random.Generator) -> None:
        for name in self.fields(example, *PICTURES):
            example.recolour(name, "to_rgb", lambda image: image.convert("RGB"))


@dataclass(frozen=True)
class ToGray(ColourTransform):
    """Makes images grey (ITU-R 601 luma), keeping their number of channels unless `channels` is given."""

    channels: int | None = None

    @override
    def __call__(self, example: Example, rng: np.random.Generator) -> None:
        def grey(image: Image.Image) -> Image.Image:
            channels = self.channels or len(image.getbands())
            return image.convert("L") if channels == 1 else image.convert("L").convert("RGB")

        for name in self.fields(example, *PICTURES):
            example.recolour(name, "to_gray", grey)


@dataclass(frozen=True)
class ColorJitter(ColourTransform):
    """Changes brightness, contrast and saturation by factors uniform in [1 - x, 1 + x], in random order.

    The same factors serve every image of a record. Hue turns by up to `hue` of the circle (0 to 0.5) either way.
    """

    brightness: float
    contrast: float | None = None
    saturation: float | None = None
    hue: float = 0.0
    probability: float = 1.0

    @override
    def __call__(self, example: Example, rng: np.random.Generator) -> None:
        if rng.random() >= self.probability:
            return
        contrast = self.brightness if self.contrast is None else self.contrast
        saturation = self.brightness if self.saturation is None else self.saturation
        spans = zip(_ENHANCERS, (self.brightness, contrast, saturation), strict=True)
        factors = [(enhancer, rng.uniform(max(0.0, 1 - span), 1 + span)) for enhancer, span in spans]
        turn = rng.uniform(-self.hue, self.hue)
        order = rng.permutation(4)

        def jitter(image: Image.Image) -> Image.Image:
            for step in order:
                if step < 3:
                    enhancer, factor = factors[step]
                    image = enhancer(image).enhance(factor)
                elif turn and image.mode == "RGB":
                    image = _turn_hue(image, turn)
            return image

        for name in self.fields(example, *PICTURES):
            example.recolour(name, "color_jitter", jitter)


_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def _turn_hue(image: Image.Image, turn: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    shifted = Image.fromarray((np.asarray(hue) + np.uint8(round(turn * 255) % 256)).astype(np.uint8))
    return Image.merge("HSV", (shifted, saturation, value)).convert("RGB")


@dataclass(frozen=True)
class Normalize(ColourTransform):
    """Turns images into float32 `(image - mean) / std`; mean and std are of values from 0 to 1."""

    mean: Statistics | None = None
    std: Statistics | None = None

    @override
    def __call__(self, example: Example, rng: np.random.Generator) -> None:
        mean, std = (np.atleast_1d(np.asarray(value, np.float32)) for value in (self.mean, self.std))
        for name in self.fields(example, *PICTURES):

            def normalized(image: Any, name: str = name) -> Float[np.ndarray, "H W C"]:
                array = as_array(image)
                if not {mean.size, std.size} <= {1, array.shape[-1]}:
                    raise ValueError(
                        f"image field {name!r} has {array.shape[-1]} channels, but data.mean has {mean.size} values "
                        f"and data.std {std.size}: give one value, one for each channel, or use 'to_rgb'"
                    )
                unit = 255 if array.dtype == np.uint8 else 1
                return _scale_and_shift(array, 1 / (unit * std), -mean / std)

            example.change(name, normalized)

    @override
    def pixel_scale(self, field: str) -> tuple[np.ndarray, np.ndarray] | None:
        mean, std = (np.atleast_1d(np.asarray(value, np.float64)) for value in (self.mean, self.std))
        return (mean, std) if self.acts_on(field) else None


@dataclass(frozen=True)
class ValueRange(ColourTransform):
    """Turns images into float32 in [low, high] (big_vision's `value_range(-1, 1)`)."""

    low: float = 0.0
    high: float = 1.0

    @override
    def __call__(self, example: Example, rng: np.random.Generator) -> None:
        def ranged(image: Any) -> Float[np.ndarray, "H W C"]:
            array = as_array(image)
            unit = 255 if array.dtype == np.uint8 else 1
            scale, shift = np.float32((self.high - self.low) / unit), np.float32(self.low)
            return _scale_and_shift(array, np.atleast_1d(scale), np.atleast_1d(shift))

        for name in self.fields(example, *PICTURES):
            example.change(name, ranged)

    @override
    def pixel_scale(self, field: str) -> tuple[np.ndarray, np.ndarray] | None:
        span = self.high - self.low
        return (np.array([-self.low / span]), np.array([1 / span])) if self.acts_on(field) else None


def _scale_and_shift(
    image: Shaped[np.ndarray, "H W C"], scale: Float[np.ndarray, " c"], shift: Float[np.ndarray, " c"]
) -> Float[np.ndarray, "H W C"]:
    """`image * scale + shift` in float32, a row at a time: NumPy is ten times slower on an innermost axis of three."""
    height, width, channels = image.shape
    scales, shifts = (np.tile(np.broadcast_to(value, channels), width) for value in (scale, shift))
    rows = np.multiply(image.reshape(height, width * channels), scales, dtype=np.float32)
    rows += shifts
    return rows.reshape(image.shape)


@dataclass(frozen=True)
class Erase(ColourTransform):
    """Random erasing (Zhong et al., arXiv:1708.04896) of a normalized image, one rectangle of Gaussian noise.

    `area` bounds the rectangle's share of the image, `ratio` its aspect; `mode` is "noise" for a draw per pixel or
    "zero" for the mean colour. Every image of a record gets a rectangle of its own, and all images of
    views or of a video the same one, with the same noise.
    """

    probability: float = 0.25
    area: tuple[float, float] = (0.02, 1 / 3)
    ratio: float = 0.3
    mode: str = "noise"

    def __post_init__(self) -> None:
        if self.mode not in ("noise", "zero"):
            raise ValueError(f"mode of 'erase' must be 'noise' or 'zero', got {self.mode!r}")

    @override
    def __call__(self, example: Example, rng: np.random.Generator) -> None:
        for name in self.fields(example, *PICTURES):
            value = example.values[name]
            image = value[0] if isinstance(value, list) else value
            if not isinstance(image, np.ndarray) or image.dtype != np.float32:
                raise ValueError(f"transform 'erase' comes after 'normalize' (field {name!r} is not float yet)")
            if rng.random() >= self.probability:
                continue
            height, width, channels = image.shape
            for _ in range(10):
                area = height * width * rng.uniform(*self.area)
                ratio = math.exp(rng.uniform(math.log(self.ratio), -math.log(self.ratio)))
                down, across = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
                if 0 < down < height and 0 < across < width:
                    top, left = int(rng.integers(height - down + 1)), int(rng.integers(width - across + 1))
                    noise = self.mode == "noise"
                    patch = rng.standard_normal((down, across, channels), np.float32) if noise else np.float32(0)
                    place = (slice(top, top + down), slice(left, left + across))
                    example.change(name, functools.partial(_with_patch, place=place, patch=patch))
                    break


def _with_patch(
    image: Float[np.ndarray, "H W C"], place: tuple[slice, slice], patch: Any
) -> Float[np.ndarray, "H W C"]:
    erased = image.copy()
    erased[place] = patch
    return erased


def as_array(image: Image.Image | EncodedImage | np.ndarray) -> np.ndarray:
    """An image in any of its forms as an array [H, W, C]."""
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array
