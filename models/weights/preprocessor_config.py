"""Hugging Face's `preprocessor_config.json`, read as what has to be done to images.

Meant are the image processors of transformers that work on Pillow; those on torchvision's tensors, which it takes where
torchvision is installed, differ from them by one of 255 levels in less than one value of a hundred.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import naming
from models.weights.preprocessing import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    Preprocessing,
    Sides,
    number_of,
    numbers_of,
    share,
    written,
)

RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box"}  # Pillow's numbers


@dataclasses.dataclass(frozen=True)
class _Processor:
    """What a class of transformers takes where the file says nothing.

    Attributes:
      square: whether one number as `size` is a square and not the shorter side.
    """

    size: Any
    resample: int = 3
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    crop_size: Any = None
    square: bool = True


PROCESSORS = {
    "ViT": _Processor(224, resample=2),
    "DeiT": _Processor(256, crop_size=224),
    "Siglip": _Processor(224),
    "Bit": _Processor(224, 3, CLIP_MEAN, CLIP_STD, 224, square=False),
    "CLIP": _Processor(224, 3, CLIP_MEAN, CLIP_STD, 224, square=False),
    "ConvNext": _Processor({"shortest_edge": 384}, square=False),
}
"""By the beginning of the class's name. A file without a name is older than these, and ViT's."""
STRETCHED_FROM = 384
"""ConvNext's processor cuts nothing off from this size on."""


def from_transformers(settings: Mapping[str, Any]) -> Preprocessing:
    """As the dictionary in a `preprocessor_config.json` says.

    Raises:
      ValueError: a class, or a step of one, that is not supported here, or images that would not come to one size; one
        line.
    """
    kind = _kind(settings)
    usual = PROCESSORS[kind]
    if settings.get("do_rescale") is False or not math.isclose(number_of(settings, "rescale_factor", 1 / 255), 1 / 255):
        raise ValueError("only pixels that are divided by 255 are supported (do_rescale, rescale_factor)")
    if settings.get("do_pad"):
        raise ValueError("do_pad is not supported")
    number = usual.resample if settings.get("resample") is None else settings["resample"]
    if number not in RESAMPLE:
        raise ValueError(f"resample={number!r}: known are {', '.join(f'{n} ({name})' for n, name in RESAMPLE.items())}")
    exact, shorter, crop = _steps(kind, settings)
    size = crop or exact
    if size is None:
        raise ValueError("images of different shapes would stay so: there is neither a height and width nor a crop")
    resized = exact or shorter
    text = written(
        share(size, resized) if resized else "",
        RESAMPLE[number],
        "stretch" if exact else "",
        "transformers",
        crop="" if crop else None,
    )
    if settings.get("do_normalize") is False:
        return Preprocessing(size, text, (0.0,) * 3, (1.0,) * 3)
    mean, std = (numbers_of(settings, f"image_{key}", getattr(usual, key), 3) for key in ("mean", "std"))
    return Preprocessing(size, text, mean, std)


def _kind(settings: Mapping[str, Any]) -> str:
    name = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "ViTImageProcessor")
    kind = re.sub(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", name)
    if kind not in PROCESSORS:
        raise ValueError(naming.unknown("image processor", name, [f"{known}ImageProcessor" for known in PROCESSORS]))
    return kind


def _steps(kind: str, settings: Mapping[str, Any]) -> tuple[Sides | None, Sides | None, Sides | None]:
    """(height, width) that is resized to, or the shorter side, twice; then what is cut out."""
    usual = PROCESSORS[kind]
    exact, shorter = _sides(settings.get("size") or usual.size, "size", usual.square)
    if settings.get("do_resize") is False:
        exact = shorter = None
    crop = None
    if settings.get("do_center_crop", usual.crop_size is not None):
        crop, _ = _sides(settings.get("crop_size") or usual.crop_size or 0, "crop_size", True)
    if kind != "ConvNext" or not shorter:
        return exact, shorter, crop
    side = shorter[0]
    if side >= STRETCHED_FROM:
        return (side, side), None, crop
    resized = int(side / number_of(settings, "crop_pct", 224 / 256))
    return None, (resized, resized), crop or (side, side)


def _sides(value: Any, name: str, square: bool) -> tuple[Sides | None, Sides | None]:
    """(height, width) to come to exactly, or the shorter side, twice."""
    if isinstance(value, Mapping):
        if set(value) == {"height", "width"}:
            return (int(value["height"]), int(value["width"])), None
        if set(value) == {"shortest_edge"}:
            return None, (int(value["shortest_edge"]),) * 2
    elif isinstance(value, int) and value > 0:
        return ((value, value), None) if square else (None, (value, value))
    elif isinstance(value, list | tuple) and len(value) == 2:
        return (int(value[0]), int(value[1])), None
    raise ValueError(f"{name}={value!r}: takes height and width, or shortest_edge")
