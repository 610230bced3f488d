"""Variants of Swin by name, and what is published of them: `swin_tiny`, `swin_base_384`.

Parameters of each are in docs/families/swin.md. Drop path belongs to the recipe (`configs/recipes/swin.py`), as for
every model.
"""

from typing import Any

from models.core.published import Published

Options = dict[str, Any]

SIZES: dict[str, Options] = {
    "tiny": {"width": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24)},
    "small": {"width": 96, "depths": (2, 2, 18, 2), "heads": (3, 6, 12, 24)},
    "base": {"width": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)},
    "large": {"width": 192, "depths": (2, 2, 18, 2), "heads": (6, 12, 24, 48)},
}
_AT_384: Options = {"image_size": 384, "window": 12}

VARIANTS: dict[str, Options] = {f"swin_{size}": options for size, options in SIZES.items()} | {
    f"swin_{size}_384": SIZES[size] | _AT_384 for size in ("base", "large")
}

_PAPER = "arXiv:2103.14030"
_PRETRAINED = "from ImageNet-22k"
PUBLISHED: dict[str, Published] = {
    "swin_tiny": Published("4.5", "81.3", "28", source=_PAPER, note="29 M in the paper, 28 M in the repository"),
    "swin_small": Published("8.7", "83.0", "50", source=_PAPER),
    "swin_base": Published("15.4", "83.5", "88", source=_PAPER, note=f"85.2 {_PRETRAINED}"),
    "swin_large": Published("34.5", "86.3", "197", source="microsoft/Swin-Transformer", note=_PRETRAINED),
    "swin_base_384": Published("47.0", "84.5", "88", 384, _PAPER, f"86.4 {_PRETRAINED}"),
    "swin_large_384": Published("103.9", "87.3", "197", 384, _PAPER, _PRETRAINED),
}
