"""RandAugment (Cubuk et al., arXiv:1909.13719) and DeiT-III's 3-Augment (Touvron et al., arXiv:2204.07118)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from typing_extensions import override

from data.source import ExampleError
from data.transform import Example, Transform, image_size
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
    not). Rotations, shears and shifts take masks, boxes, points and flow along.
    """

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
            images = self.fields(example, "image")
            for name in images:
                image = example.eight_bit(name, "randaugment")
                example.values[name] = image if change in MOVES else COLOUR_CHANGES[change](image, strength)
            if change in MOVES and images:
                width, height = example.values["image" if "image" in images else images[0]].size
                shaped = self.fields(example, "image", "mask", "flow")
                for name in self.fields(example):
                    size = image_size(example.values[name]) if name in shaped else (width, height)
                    if abs(size[0] - size[1] * width / height) > 1:  # a pixel for sizes that were rounded
                        raise ExampleError(
                            f"example {example.values.get('index')}: randaugment turns images of {width}x{height} and "
                            f"{name!r} of {size[0]}x{size[1]} together, which takes one ratio of width to height; "
                            "restrict it by on="
                        )
                    warp = Affine(size, inverse_map(change, strength.signed, *size), self.interpolation)
                    example.values[name] = warp_field(warp, example.kinds[name], example.values[name], self.fill or 0.0)


@dataclass(frozen=True)
class ThreeAugment(Transform):
    """Makes an image grey, solarizes it at 128, or blurs it with a deviation of 0.1 to 2 pixels: one of the three."""

    @override
    def __call__(self, example: Example, rng: np.random.Generator) -> None:
        choice, radius = int(rng.integers(3)), rng.uniform(0.1, 2.0)
        for name in self.fields(example, "image"):
            image = example.eight_bit(name, "three_augment")
            if choice == 0:
                changed = image.convert("L").convert(image.mode)
            elif choice == 1:
                changed = ImageOps.solarize(image, 128)
            else:
                changed = image.filter(ImageFilter.GaussianBlur(radius))
            example.values[name] = changed
