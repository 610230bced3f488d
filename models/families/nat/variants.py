"""Variants of the NAT papers by name: `nat_tiny`, `dinat_base`, `dinat_s_small`, `nat_iso_s`, `vitrpb_b`.

Parameters, multiply-adds and published accuracy of each are in docs/families/nat.md. Drop path belongs to the recipe
(`configs/recipes/nat.py`), as for every model.
"""

import re
from typing import Any

from models.core.published import Published

Options = dict[str, Any]


def _size(depths: tuple[int, ...], width: int, mlp_ratio: float) -> Options:
    """Heads are 32 wide in every model of the papers."""
    heads = tuple(width * 2**stage // 32 for stage in range(len(depths)))
    return {"depths": depths, "width": width, "heads": heads, "mlp_ratio": mlp_ratio}


SIZES: dict[str, Options] = {
    "mini": _size((3, 4, 6, 5), 64, 3),
    "tiny": _size((3, 4, 18, 5), 64, 3),
    "small": _size((3, 4, 18, 5), 96, 2),
    "base": _size((3, 4, 18, 5), 128, 2),
    "large": _size((3, 4, 18, 5), 192, 2),
}
SWIN_SIZES: dict[str, Options] = {
    "tiny": _size((2, 2, 6, 2), 96, 4),
    "small": _size((2, 2, 18, 2), 96, 4),
    "base": _size((2, 2, 18, 2), 128, 4),
    "large": _size((2, 2, 18, 2), 192, 4),
}
"""Depths and MLPs of Swin, which DiNAT_s has with the attention exchanged."""

# Layer scale is in NAT from Small on, in DiNAT in Base alone.
_LAYER_SCALE: dict[str, Options] = {name: {"layer_scale": 1e-5} for name in ("nat_small", "nat_base", "dinat_base")}
_DILATED: Options = {"dilations": "largest"}
_AS_SWIN: Options = {"stem": "patches", "downsample": "merging"}
_ISOTROPIC: dict[str, Options] = {
    "s": {"patch_size": 16, "width": 384, "depth": 12, "heads": 12},
    "b": {"patch_size": 16, "width": 768, "depth": 12, "heads": 24},
}


def _hierarchies() -> dict[str, Options]:
    variants = {f"nat_{size}": SIZES[size] for size in ("mini", "tiny", "small", "base")}
    variants |= {f"dinat_{size}": options | _DILATED for size, options in SIZES.items()}
    variants |= {f"dinat_s_{size}": options | _AS_SWIN | _DILATED for size, options in SWIN_SIZES.items()}
    for name in ("dinat_large", "dinat_s_large"):
        variants[f"{name}_384"] = variants[name] | {"image_size": 384}
    variants["dinat_large_11x11_384"] = variants["dinat_large_384"] | {"window": 11}
    return {name: options | _LAYER_SCALE.get(name, {}) for name, options in variants.items()}


def _isotropic() -> dict[str, Options]:
    kinds: dict[str, Options] = {
        "nat_iso": {},
        "dinat_iso": {"dilation": "largest"},
        "vitrpb": {"attention": "dense"},
    }
    return {f"{kind}_{size}": _ISOTROPIC[size] | own for kind, own in kinds.items() for size in _ISOTROPIC}


# Multiply-adds in G and top-1, as printed in the papers and the official repository.
_PRINTED: dict[str, tuple[str, str]] = {
    "nat_mini": ("2.7", "81.8"),
    "nat_tiny": ("4.3", "83.2"),
    "nat_small": ("7.8", "83.7"),
    "nat_base": ("13.7", "84.3"),
    "dinat_mini": ("2.7", "81.8"),
    "dinat_tiny": ("4.3", "82.7"),
    "dinat_small": ("7.8", "83.8"),
    "dinat_base": ("13.7", "84.4"),
    "dinat_large": ("30.6", "86.6"),
    "dinat_large_384": ("89.7", "87.4"),
    "dinat_large_11x11_384": ("92.4", "87.5"),
    "dinat_s_tiny": ("4.5", "81.8"),
    "dinat_s_small": ("8.7", "83.5"),
    "dinat_s_base": ("15.4", "83.8"),
    "dinat_s_large": ("34.5", "86.5"),
    "dinat_s_large_384": ("101.5", "87.4"),
    "nat_iso_s": ("4.3", "80.0"),
    "nat_iso_b": ("16.9", "81.6"),
    "dinat_iso_s": ("4.3", "80.8"),
    "dinat_iso_b": ("16.9", "82.1"),
    "vitrpb_s": ("4.6", "81.2"),
    "vitrpb_b": ("17.5", "82.5"),
}


def _published() -> dict[str, Published]:
    return {
        name: Published(
            multiply_adds,
            top1,
            image_size=384 if name.endswith("384") else 224,
            source="arXiv:2204.07143" if re.fullmatch("nat_(mini|tiny|small|base)", name) else "arXiv:2209.15001",
            note="from ImageNet-22k" if "large" in name else "",
        )
        for name, (multiply_adds, top1) in _PRINTED.items()
    }


VARIANTS = _hierarchies()
ISOTROPIC = _isotropic()
PUBLISHED = _published()
