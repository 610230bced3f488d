"""RandAugment (Cubuk et al., arXiv:1909.13719) and DeiT-III's 3-Augment (Touvron et al., arXiv:2204.07118)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from typing_extensions import override

from data.colour import ColourTransform
from data.kinds import MOVED, PICTURES
from data.source import ExampleError
from data.transform import Example, Layout, Transform
from data.warp import Affine, Fill, check_interpolation, warp_field

MAX_MAGNITUDE = 10.0
ROTATE_DEGREES, SHEAR, TRANSLATE, ENHANCE = 30.0, 0.3, 0.45, 0.9  # at magnitude 10


@dataclass(frozen=True)
class Strength:
    """How strong one change is: `level` in [0, 1], `sign` +1 or -1, and whether stronger always means further."""

    level: float
    sign: float
    increasing: bool

    @property
    def signed(self) -> float:
        """In [-1, 1], for rotations, shears and shifts."""
        return self.sign * self.level

    @property
    def factor(self) -> float:
        """Of an enhancement, 1 for none; the paper's goes from 0.1 to 1.9 with the level."""
        return max(1 + ENHANCE * self.signed, 0.1) if self.increasing else 0.1 + 2 * ENHANCE * self.level

    @property
    def bits(self) -> int:
        """Kept by posterize; the paper keeps more the higher the level."""
        kept = int(4 * self.level)
        return max(4 - kept if self.increasing else kept, 1)

    @property
    def threshold(self) -> int:
        """From which solarize inverts; the paper inverts less the higher the level."""
        threshold = int(256 * self.level)
        return 256 - threshold if self.increasing else threshold


def _solarize_add(image: Image.Image, strength: Strength) -> Image.Image:
    amount = min(128, int(strength.level * 110))
    table = [min(255, value + amount) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


COLOUR_CHANGES: dict[str, Callable[[Image.Image, Strength], Image.Image]] = {
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "invert": lambda image, _: ImageOps.invert(image),
    "posterize": lambda image, strength: ImageOps.posterize(image, strength.bits),
    "solarize": lambda image, strength: ImageOps.solarize(image, strength.threshold),
    "solarize_add": _solarize_add,
    "color": lambda image, strength: ImageEnhance.Color(image).enhance(strength.factor),
    "contrast": lambda image, strength: ImageEnhance.Contrast(image).enhance(strength.factor),
    "brightness": lambda image, strength: ImageEnhance.Brightness(image).enhance(strength.factor),
    "sharpness": lambda image, strength: ImageEnhance.Sharpness(image).enhance(strength.factor),
}
MOVES = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
CHANGES = (*COLOUR_CHANGES, *MOVES)


def _recoloured(image: Image.Image, change: str, strength: Strength) -> Image.Image:
    return image if change in MOVES else COLOUR_CHANGES[change](image, strength)


def inverse_map(move: str, strength: float, width: int, height: int) -> tuple[float, float, float, float, float, float]:
    """The affine map from output to input coordinates of one of MOVES."""
    if move == "rotate":
        angle = math.radians(ROTATE_DEGREES * strength)
        cosine, sine, x, y = math.cos(angle), math.sin(angle), width / 2, height / 2
        return cosine, -sine, x - cosine * x + sine * y, sine, cosine, y - sine * x - cosine * y
    if move == "shear_x":
        return 1, SHEAR * strength, 0, 0, 1, 0
    if move == "shear_y":
        return 1, 0, 0, SHEAR * strength, 1, 0
    if move == "translate_x":
        return 1, 0, TRANSLATE * strength * width, 0, 1, 0
    return 1, 0, 0, 0, 1, TRANSLATE * strength * height


@dataclass(frozen=True)
class RandAugment(Transform):
    """Applies `count` changes drawn from 15 with replacement, each with this probability, at a magnitude of 0 to 10.

    The defaults are the paper's, and big_vision's `randaug(2, 10)` but for cutout, its 16th change. DeiT's recipe,
    timm's `rand-m9-mstd0.5-inc1`, is `randaugment(2, 9, std=0.5, probability=0.5, increasing=True)`: the magnitude is
    normal with deviation `std`, and every change grows with it (in the paper enhancements, posterize and solarize do
    not). Rotations, shears and shifts take all along that geometric transforms move.
    """

    acts: ClassVar[tuple[str, ...] | None] = MOVED

    count: int = 2
    magnitude: float = 9.0
    std: float = 0.0
    probability: float = 1.0
    increasing: bool = False
    interpolation: str = "bilinear"
    fill: Fill | None = None

    def __post_init__(self) -> None:
        check_interpolation(self.interpolation)

    @override
    def __call__(self, example: Example, rng: np.random.Generator) -> None:
        for _ in range(self.count):
            change = CHANGES[int(rng.integers(len(CHANGES)))]
            magnitude, sign, chance = rng.normal(self.magnitude, self.std), rng.choice((-1.0, 1.0)), rng.random()
            if chance >= self.probability:
                continue
            strength = Strength(min(max(magnitude / MAX_MAGNITUDE, 0.0), 1.0), float(sign), self.increasing)
            pictures = self.fields(example, *PICTURES)
            recolour = functools.partial(_recoloured, change=change, strength=strength)
            for name in pictures:
                example.recolour(name, "randaugment", recolour)
            if change in MOVES and pictures:
                self._move(example, change, strength.signed)

    def _move(self, example: Example, move: str, strength: float) -> None:
        layout = Layout.of(self, example)
        width, height = layout.sizes[layout.leader]
        for name in self.fields(example, *MOVED):
            size = layout.sizes[layout.followed(name)]
            if abs(size[0] - size[1] * width / height) > 1:  # a pixel for sizes that were rounded
                raise ExampleError(
                    f"example {example.values.get('index')}: randaugment turns images of {width}x{height} and "
                    f"{name!r} of {size[0]}x{size[1]} together, which takes one ratio of width to height; "
                    "restrict it by on="
                )
            warp = Affine(size, inverse_map(move, strength, *size), self.interpolation)
            example.values[name] = warp_field(warp, example.kinds[name], example.values[name], self.fill or 0.0)

    @override
    def refusal(self, kinds: Mapping[str, str]) -> str | None:
        for name, kind in kinds.items():
            if kind == "disparity":
                return f"turns images, and a displacement along rows such as {name!r} (disparity) does not stay one"
        if self.on is not None and not any(kinds[name] in PICTURES for name in kinds if self.acts_on(name)):
            return f"finds no picture ({', '.join(PICTURES)}) among the fields of on={self.on!r}"
        return super().refusal(kinds)


@dataclass(frozen=True)
class ThreeAugment(ColourTransform):
    """Makes an image grey, solarizes it at 128, or blurs it with a deviation of 0.1 to 2 pixels: one of the three."""

    @override
    def __call__(self, example: Example, rng: np.random.Generator) -> None:
        choice, radius = int(rng.integers(3)), rng.uniform(0.1, 2.0)
        changes: tuple[Callable[[Image.Image], Image.Image], ...] = (
            lambda image: image.convert("L").convert(image.mode),
            lambda image: ImageOps.solarize(image, 128),
            lambda image: image.filter(ImageFilter.GaussianBlur(radius)),
        )
        for name in self.fields(example, *PICTURES):
            example.recolour(name, "three_augment", changes[choice])
