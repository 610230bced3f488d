"""Variants of VOLO by name, `volo_d1` to `volo_d5` at 224 pixels and `volo_d5_512` and so on for larger images.

Drop path belongs to the recipe (`configs/recipes/volo.py`), as for every model.
"""

from typing import Any

from models.core.published import Published

Options = dict[str, Any]


def _size(depths: tuple[int, ...], widths: tuple[int, int], heads: tuple[int, int], **more: Any) -> Options:
    """Outlook attention in the first stage; the other three are alike."""
    return {"depths": depths, "widths": widths[:1] + widths[1:] * 3, "heads": heads[:1] + heads[1:] * 3, **more}


SIZES: dict[str, Options] = {
    "volo_d1": _size((4, 4, 8, 2), (192, 384), (6, 12)),
    "volo_d2": _size((6, 4, 10, 4), (256, 512), (8, 16)),
    "volo_d3": _size((8, 8, 16, 4), (256, 512), (8, 16)),
    "volo_d4": _size((8, 8, 16, 4), (384, 768), (12, 16)),
    "volo_d5": _size((12, 12, 20, 4), (384, 768), (12, 16), mlp_ratio=4.0, stem_width=128),
}
LARGER: dict[str, tuple[int, ...]] = {
    "volo_d1": (384,),
    "volo_d2": (384,),
    "volo_d3": (448,),
    "volo_d4": (448,),
    "volo_d5": (448, 512),
}
"""Image sizes that a model was fine-tuned for."""

VARIANTS: dict[str, Options] = SIZES | {
    f"{name}_{size}": SIZES[name] | {"image_size": size} for name, sizes in LARGER.items() for size in sizes
}

_PAPER = "arXiv:2106.13112"
_TIMM = "top-1: arXiv:2106.13112; multiply-adds: model card of timm"
_D3 = "the paper's multiply-adds (67.9) are those of 384 pixels"
_D5 = "the paper's multiply-adds ({}) are those of a stem of 64 channels; the model has 128"
PUBLISHED: dict[str, Published] = {
    "volo_d1": Published("6.8", "84.2", "27", source=_PAPER),
    "volo_d2": Published("14.1", "85.2", "59", source=_PAPER),
    "volo_d3": Published("20.6", "85.4", "86", source=_PAPER),
    "volo_d4": Published("43.8", "85.7", "193", source=_PAPER),
    "volo_d5": Published("72.4", "86.1", "296", note=_D5.format("69.0"), source=_TIMM),
    "volo_d1_384": Published("22.8", "85.2", "27", 384, source=_PAPER),
    "volo_d2_384": Published("46.1", "86.0", "59", 384, source=_PAPER),
    "volo_d3_448": Published("96.3", "86.3", "86", 448, note=_D3, source=_TIMM),
    "volo_d4_448": Published("197", "86.8", "193", 448, source=_PAPER),
    "volo_d5_448": Published("315.1", "87.0", "296", 448, note=_D5.format("304"), source=_TIMM),
    "volo_d5_512": Published("425.1", "87.1", "296", 512, note=_D5.format("412"), source=_TIMM),
}
