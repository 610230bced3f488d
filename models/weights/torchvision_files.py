"""What images go through for torchvision's files of weights, which say nothing themselves but have names of their own.

The numbers are those of `torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1.transforms()` and the like, of 0.29.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.weights.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, from_torchvision


def _preset(size: int, resized: int, interpolation: str = "bicubic") -> Mapping[str, Any]:
    return {
        "crop_size": size,
        "resize_size": resized,
        "interpolation": interpolation,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
    }


PRESETS = {
    "vit_b_16": _preset(224, 256, "bilinear"),
    "vit_b_16_swag": _preset(384, 384),
    "vit_b_16_lc_swag": _preset(224, 224),
    "vit_b_32": _preset(224, 256, "bilinear"),
    "vit_l_16": _preset(224, 242, "bilinear"),
    "vit_l_16_swag": _preset(512, 512),
    "vit_l_16_lc_swag": _preset(224, 224),
    "vit_l_32": _preset(224, 256, "bilinear"),
    "vit_h_14_swag": _preset(518, 518),
    "vit_h_14_lc_swag": _preset(224, 224),
    "swin_t": _preset(224, 232),
    "swin_s": _preset(224, 246),
    "swin_b": _preset(224, 238),
    "maxvit_t": _preset(224, 224),
}
"""By the name of the file before its hash."""


def of_name(path: str | os.PathLike[str]) -> Preprocessing | None:
    """That of a file called as torchvision calls it, `vit_b_16-c867db91.pth`; None for any other name."""
    match = re.fullmatch(r"(\w+)-[0-9a-f]{8}\.pth", Path(path).name)
    preset = PRESETS.get(match[1]) if match else None
    return from_torchvision(preset) if preset else None
