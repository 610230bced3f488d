"""What has to be done to images before a model sees them, as its authors did it: size, crop, interpolation, mean, std.

It is said in the words of `data.eval_transforms` (docs/data.md), so that an evaluation, the header of an exported file
and a table read the same thing. timm, torchvision and Hugging Face's transformers each say it in another form; the
functions here and in `models/weights/preprocessor_config.py` read these.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import naming

Sides = tuple[int, int]  # (height, width)
Values = tuple[float, ...]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
"""Mean and deviation that bring pixels to -1 to 1: Google's models."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box")
CROPS = ("center", "squash", "border")
DEFAULT_CROP = 0.875
"""timm's, where nothing is said."""


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How images become what a model takes.

    Attributes:
      image_size: (height, width) in pixels that the model sees.
      transforms: what brings an image to that, as `data.eval_transforms`; `{size}` stands for the size, so that another
        one can be chosen.
      mean, std: of each channel, of values from 0 to 1; what `normalize` in `transforms` takes.
      source: who says so, for messages and tables.
    """

    image_size: Sides
    transforms: str
    mean: Values = IMAGENET_MEAN
    std: Values = IMAGENET_STD
    source: str = dataclasses.field(default="", compare=False)

    def as_json(self) -> dict[str, Any]:
        """The fields but the source as plain values, for a header or a file."""
        names = ("image_size", "transforms", "mean", "std")
        values = ((name, getattr(self, name)) for name in names)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values}

    @classmethod
    def of_json(cls, values: Any) -> Preprocessing:
        """The reverse. ValueError for anything else."""
        try:
            height, width = values["image_size"]
            made = cls(
                (int(height), int(width)), str(values["transforms"]), _floats(values["mean"]), _floats(values["std"])
            )
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError("no preprocessing: it needs image_size, transforms, mean and std") from error
        return made


def cropped(
    size: int | Sides,
    crop: float = DEFAULT_CROP,
    interpolation: str = "bicubic",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    mode: str = "center",
    source: str = "",
) -> Preprocessing:
    """What timm does for an evaluation.

    Args:
      size: side, or (height, width), in pixels, of what the model sees.
      crop: its share of the side of the resized image (`crop_pct`), rounded down to pixels.
      mode: what the resized image is: "center" keeps the shape and covers that square, whose middle is cut out;
        "squash" is stretched to it; "border" keeps the shape, lies inside and is filled up with the mean colour.

    Raises:
      ValueError: an interpolation, mode or size that there is not.
    """
    sides = (size, size) if isinstance(size, int) else size
    if interpolation not in INTERPOLATIONS:
        raise ValueError(naming.unknown("interpolation", interpolation, INTERPOLATIONS))
    if mode not in CROPS:
        raise ValueError(naming.unknown("crop_mode", mode, CROPS))
    if not 0 < crop < math.inf or min(sides) < 1:
        raise ValueError(f"crop_pct={crop} of {sides[0]}x{sides[1]} pixels: takes a positive share of a size")
    fit = {"center": "", "squash": "stretch", "border": "contain"}[mode]
    fill = f", fill={tuple(round(255 * value) for value in mean)}" if mode == "border" else ""
    resized = "{size}" if crop == 1 else f"{{size//{float(crop)!r}}}"
    return Preprocessing(
        sides, written(resized, interpolation, fit, "timm", crop=fill), _floats(mean), _floats(std), source
    )


def written(resized: str, interpolation: str, fit: str, like: str, *, crop: str | None) -> str:
    """Transforms that resize and, if `crop` says how (`", fill=0"` or nothing), cut out the middle."""
    fitted = f", fit='{fit}'" if fit else ""
    steps = [f"resize({resized}, '{interpolation}'{fitted}, like='{like}')"] if resized else []
    steps += [f"center_crop({{size}}, like='{like}'{crop})"] if crop is not None else []
    return "|".join([*steps, "normalize"])


def share(size: Sides, resized: Sides) -> str:
    """`{size//0.875}`, which is `resized` at this size and follows another one; the numbers where there is no such
    share.
    """
    if size == resized:
        return "{size}"
    for digits in range(1, 8):
        part = math.floor(size[0] / resized[0] * 10**digits) / 10**digits
        if part and all(math.floor(side / part) == wanted for side, wanted in zip(size, resized, strict=True)):
            return f"{{size//{part:.{digits}f}}}"
    return str(resized[0]) if resized[0] == resized[1] else str(resized)


def from_timm(settings: Mapping[str, Any]) -> Preprocessing:
    """As timm's `pretrained_cfg` says, the dictionary below that key in `config.json` or the one of a model.

    Raises:
      ValueError: a value that timm does not know, or that is not supported here; one line.
    """
    channels, *sides = numbers_of(settings, "input_size", (3, 224, 224), 3)
    if settings.get("crop_border_pixels"):
        raise ValueError("crop_border_pixels is not supported")
    mean, std = (
        numbers_of(settings, key, usual, int(channels))
        for key, usual in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD))
    )
    return cropped(
        (int(sides[0]), int(sides[1])),
        number_of(settings, "crop_pct", DEFAULT_CROP),
        str(settings.get("interpolation") or "bicubic"),
        mean,
        std,
        str(settings.get("crop_mode") or "center"),
    )


def from_torchvision(transforms: Any) -> Preprocessing:
    """As the transforms of torchvision's weights say, `ViT_B_16_Weights.IMAGENET1K_V1.transforms()`.

    Args:
      transforms: that object, or a mapping with its `crop_size`, `resize_size`, `interpolation`, `mean` and `std`.

    Raises:
      ValueError: it lacks one of these, or has a value that is not supported here; one line.
    """
    keys = ("crop_size", "resize_size", "interpolation", "mean", "std")
    found = dict(transforms) if isinstance(transforms, Mapping) else {
        key: getattr(transforms, key) for key in keys if hasattr(transforms, key)
    }  # fmt: skip
    if missing := [key for key in keys if key not in found]:
        raise ValueError(f"transforms of torchvision have {', '.join(keys)}; {missing[0]} is missing")
    interpolation = str(getattr(found["interpolation"], "value", found["interpolation"]))
    if interpolation not in INTERPOLATIONS:
        raise ValueError(naming.unknown("interpolation", interpolation, INTERPOLATIONS))
    size = _square(found["crop_size"], "crop_size")
    resized = share(size, _square(found["resize_size"], "resize_size"))
    text = written(resized, interpolation, "", "torchvision", crop="")
    return Preprocessing(size, text, _floats(found["mean"]), _floats(found["std"]))


def _square(value: Any, name: str) -> Sides:
    sides = [value] if isinstance(value, int) else list(value)
    if len(set(sides)) != 1:
        raise ValueError(f"{name}={value}: takes one number of pixels")
    return int(sides[0]), int(sides[0])


def numbers_of(settings: Mapping[str, Any], key: str, usual: Values, length: int) -> Values:
    """Numbers that a file of settings holds, or the usual ones. ValueError for anything else."""
    value = settings.get(key) or usual
    try:
        numbers = _floats(value)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != length or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{key}={value!r}: takes {length} numbers")
    return numbers


def number_of(settings: Mapping[str, Any], key: str, usual: float) -> float:
    """The same for one number."""
    value = settings.get(key) or usual
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key}={value!r}: takes a number")
    return float(value)


def _floats(values: Any) -> Values:
    return tuple(float(value) for value in values)
