"""Variants of DaViT by name, and what is published of them: `davit_tiny`, `davit_base_fl`.

Parameters of each are in docs/families/davit.md. Drop path belongs to the recipe (`configs/recipes/davit.py`), as for
every model.
"""

from typing import Any

from models.core.published import Published

Options = dict[str, Any]


def _size(depths: tuple[int, ...], width: int) -> Options:
    """Widths double from stage to stage; heads and groups of channels are 32 wide."""
    widths = tuple(width * 2**stage for stage in range(4))
    return {"depths": depths, "widths": widths, "heads": tuple(channels // 32 for channels in widths)}


SIZES: dict[str, Options] = {
    "tiny": _size((1, 1, 3, 1), 96),
    "small": _size((1, 1, 9, 1), 96),
    "base": _size((1, 1, 9, 1), 128),
    "large": _size((1, 1, 9, 1), 192),
    "huge": _size((1, 1, 9, 1), 256),
    "giant": _size((1, 1, 12, 3), 384),
}
# Published at these sizes; weights fit any size and window.
_AT: dict[str, Options] = {
    "large": {"image_size": 384, "window": 12},
    "huge": {"image_size": 512, "window": 16},
    "giant": {"image_size": 512, "window": 16},
}
_FLORENCE: Options = {
    "image_size": 768,
    "window": 12,
    "channel_version": 2,
    "downsample_size": 3,
    "named_blocks": True,
}

VARIANTS: dict[str, Options] = {f"davit_{name}": size | _AT.get(name, {}) for name, size in SIZES.items()} | {
    f"davit_{name}_fl": SIZES[name] | _FLORENCE for name in ("base", "huge")
}

_PAPER, _TOWER = "arXiv:2204.03645", "arXiv:2311.06242"
# The figures of the two largest are those with overlapping kernels between the stages, an option of the official
# code, which publishes neither; timm's variants of these names, and so those here, have none.
_PAIRS = "from 1.5 G image-text pairs; with downsample_size=3"
PUBLISHED: dict[str, Published] = {
    "davit_tiny": Published("4.5", "82.8", "28.3", source=_PAPER),
    "davit_small": Published("8.8", "84.2", "49.7", source=_PAPER),
    "davit_base": Published("15.5", "84.6", "87.9", source=_PAPER),
    "davit_large": Published("103.0", "87.5", "196.8", 384, _PAPER, "from ImageNet-22k"),
    "davit_huge": Published(None, "90.2", None, 512, _PAPER, f"{_PAIRS} 334.8 G multiply-adds, 362 M parameters"),
    "davit_giant": Published(None, "90.4", None, 512, _PAPER, f"{_PAIRS} 1038 G multiply-adds, 1437 M parameters"),
    "davit_base_fl": Published(None, None, "90", 768, _TOWER, "image encoder of Florence-2-B, without a head"),
    "davit_huge_fl": Published(None, None, "360", 768, _TOWER, "image encoder of Florence-2-L, without a head"),
}
