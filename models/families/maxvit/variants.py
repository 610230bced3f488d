"""Variants of the MaxViT paper by name: `maxvit_tiny` to `maxvit_xlarge` for 224 pixels, `_384` and `_512` for others.

Parameters, multiply-adds and published accuracy of each are in docs/families/maxvit.md. Drop path belongs to the recipe
(`configs/recipes/maxvit.py`), as for every model.
"""

from typing import Any

from models.core.published import Published

Options = dict[str, Any]


def _size(width: int, depths: tuple[int, ...], stem: int) -> Options:
    """Widths double from stage to stage; the dense layer before the head is as wide as the last."""
    widths = tuple(width * 2**stage for stage in range(len(depths)))
    return {"widths": widths, "depths": depths, "stem_widths": stem, "pre_logits": widths[-1]}


SIZES: dict[str, Options] = {
    "tiny": _size(64, (2, 2, 5, 2), 64),
    "small": _size(96, (2, 2, 5, 2), 64),
    "base": _size(96, (2, 6, 14, 2), 64),
    "large": _size(128, (2, 6, 14, 2), 128),
    "xlarge": _size(192, (2, 6, 14, 2), 192),
}
IMAGE_SIZES = (224, 384, 512)

# Multiply-adds in G and top-1 of a model trained on ImageNet-1k alone, at 224, 384 and 512 pixels; parameters in M.
_FIGURES: dict[str, tuple[str, tuple[tuple[str, str | None], ...]]] = {
    "tiny": ("31", (("5.6", "83.62"), ("17.7", "85.24"), ("33.7", "85.72"))),
    "small": ("69", (("11.7", "84.45"), ("36.1", "85.74"), ("67.6", "86.19"))),
    "base": ("120", (("24.2", "84.95"), ("74.2", "86.34"), ("138.5", "86.66"))),
    "large": ("212", (("43.9", "85.17"), ("133.1", "86.40"), ("245.4", "86.70"))),
    "xlarge": ("475", (("97.8", None), ("293.7", "88.51"), ("535.2", "88.70"))),
}
# What the same models reach from ImageNet-21k, where both are published.
_FROM_21K = {"base_384": "88.24", "base_512": "88.38", "large_384": "88.32", "large_512": "88.46"}


def _variants() -> dict[str, Options]:
    return {
        _name(size, side): options | ({} if side == IMAGE_SIZES[0] else {"image_size": side})
        for size, options in SIZES.items()
        for side in IMAGE_SIZES
    }


def _name(size: str, side: int) -> str:
    return f"maxvit_{size}" if side == IMAGE_SIZES[0] else f"maxvit_{size}_{side}"


def _published() -> dict[str, Published]:
    found = {}
    for size, (parameters, figures) in _FIGURES.items():
        for side, (multiply_adds, top1) in zip(IMAGE_SIZES, figures, strict=True):
            other = _FROM_21K.get(f"{size}_{side}")
            note = f"{other} from ImageNet-21k" if other else "from ImageNet-21k" if size == "xlarge" else ""
            found[_name(size, side)] = Published(
                multiply_adds=multiply_adds,
                top1=top1,
                parameters=parameters,
                image_size=side,
                source="arXiv:2204.01697",
                note=note,
                besides=_lookups(SIZES[size], side // 32) / 1e9,
            )
    return found


def _lookups(options: Options, window: int) -> int:
    """Multiply-adds of the official lookup of biases, a product with a one-hot matrix for each axis. Without them the
    published count of Tiny at 384 and 512 pixels is out of reach.
    """
    heads = sum(2 * depth * width // 32 for depth, width in zip(options["depths"], options["widths"], strict=True))
    return heads * window**2 * (2 * window - 1) * (window**2 + 2 * window - 1)


VARIANTS = _variants()
PUBLISHED = _published()
