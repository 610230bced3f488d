"""Vision Transformer variants by name: `{family}_{size}{patch}[_{option}]`, `vit_s16`, `deit_b16_distilled`.

Widths are those of the published models; hidden widths are exact, not ratios.
"""

from typing import Any

from models.core.published import Published

Options = dict[str, Any]


def _size(width: int, depth: int, heads: int, mlp_width: int | None = None) -> Options:
    return {"width": width, "depth": depth, "heads": heads, "mlp_width": mlp_width or 4 * width}


SIZES: dict[str, Options] = {
    "mu": _size(32, 1, 2),
    "ti": _size(192, 12, 3),
    "s": _size(384, 12, 6),
    "m": _size(512, 12, 8),
    "b": _size(768, 12, 12),
    "l": _size(1024, 24, 16),
    "so400m": _size(1152, 27, 16, 4304),
    "h": _size(1280, 32, 16),
    "g": _size(1408, 40, 16, 6144),
    "gopt": _size(1536, 40, 16, 6144),
    "G": _size(1664, 48, 16, 8192),
    "Gopt": _size(1536, 48, 16, 8192),
    "e": _size(1792, 56, 16, 15360),
}
"""Sizes of ViT and of "Scaling Vision Transformers" (arXiv:2106.04560), named as in big_vision: g and G differ."""

PATCHES = (8, 14, 16, 32)
_DEIT3 = {"prefix_positions": False, "layer_scale": 1e-6}
_DINOV2 = {"patch_size": 14, "image_size": 518, "layer_scale": 1e-5}
_REG4 = {"registers": 4, "prefix_positions": False}
_SIGLIP = {"class_token": False, "pool": "map", "activation": "gelu_tanh"}
_CLIP = {"pre_norm": True, "norm_eps": 1e-5}
# timm's small models with registers and average pooling ("searching for better baselines").
_SBB = {"patch_size": 16, "image_size": 256, "class_token": False, "pool": "avg", "layer_scale": 1e-5}
_SBB_REG = _SBB | {"prefix_positions": False}
_DINOV2_SIZES = {
    "s": SIZES["s"],
    "b": SIZES["b"],
    "l": SIZES["l"],
    "g": _size(1536, 40, 24, 4096) | {"mlp": "swiglu"},
}


def _variants() -> dict[str, Options]:
    variants = {
        f"vit_{size}{patch}": options | {"patch_size": patch} for size, options in SIZES.items() for patch in PATCHES
    }
    for size in ("ti", "s", "b"):
        variants[f"deit_{size}16"] = SIZES[size] | {"patch_size": 16}
        variants[f"deit_{size}16_distilled"] = SIZES[size] | {"patch_size": 16, "distillation_token": True}
    for size, patch in (("s", 16), ("m", 16), ("b", 16), ("l", 16), ("h", 14)):
        variants[f"deit3_{size}{patch}"] = SIZES[size] | _DEIT3 | {"patch_size": patch}
    for size, options in _DINOV2_SIZES.items():
        variants[f"dinov2_{size}14"] = options | _DINOV2
        variants[f"dinov2_{size}14_reg4"] = options | _DINOV2 | _REG4
    for size, patch in (("b", 16), ("b", 32), ("l", 16), ("so400m", 14), ("so400m", 16), ("gopt", 16)):
        variants[f"vit_{size}{patch}_siglip"] = SIZES[size] | _SIGLIP | {"patch_size": patch}
    for size, patch in (("b", 32), ("b", 16), ("l", 14), ("h", 14)):
        variants[f"vit_{size}{patch}_clip"] = SIZES[size] | _CLIP | {"patch_size": patch}
    variants["vit_wee16_reg1"] = _size(256, 14, 4, 1280) | _SBB_REG | {"registers": 1}
    variants["vit_little16_reg4"] = _size(320, 14, 5, 1792) | _SBB_REG | {"registers": 4}
    variants["vit_medium16_reg4"] = _size(512, 12, 8) | _SBB_REG | {"registers": 4}
    variants["vit_betwixt16_reg4"] = _size(640, 12, 10) | _SBB_REG | {"registers": 4}
    return variants


VARIANTS = _variants()

# Of arXiv:2106.04560, table 2, in G: it prints FLOPs, two for each multiply-add.
_PRINTED_FLOPS = {
    "vit_ti16": "2.5",
    "vit_s16": "9.2",
    "vit_s32": "2.3",
    "vit_b16": "35.1",
    "vit_b32": "8.7",
    "vit_l16": "122.9",
    "vit_g14": "533.1",
    "vit_G14": "965.3",
}
# Multiply-adds in G and top-1 after training on ImageNet-1k alone. Of DeiT (arXiv:2012.12877) the multiply-adds are
# those that later papers print (arXiv:2102.12122, 2103.14030).
_DEIT = {
    "deit_ti16": ("1.3", "72.2"),
    "deit_s16": ("4.6", "79.8"),
    "deit_b16": ("17.5", "81.8"),
    "deit_ti16_distilled": (None, "74.5"),
    "deit_s16_distilled": (None, "81.2"),
    "deit_b16_distilled": (None, "83.4"),
}
_DEIT_III = {
    "deit3_s16": ("4.6", "81.4"),
    "deit3_m16": ("8.0", "83.0"),
    "deit3_b16": ("17.5", "83.8"),
    "deit3_l16": ("61.6", "84.9"),
    "deit3_h14": ("167.4", "85.2"),
}
# A linear classifier on the frozen model, at 224 pixels; without and with registers.
_LINEAR = {"s": ("81.1", "80.9"), "b": ("84.5", "84.6"), "l": ("86.3", "86.7"), "g": ("86.5", "87.1")}


def _published() -> dict[str, Published]:
    found = {
        name: Published(_halved(flops), source="arXiv:2106.04560", note=f"{flops} G FLOPs printed, two for each")
        for name, flops in _PRINTED_FLOPS.items()
    }
    found |= {name: Published(*figures, source="arXiv:2012.12877") for name, figures in _DEIT.items()}
    found |= {name: Published(*figures, source="arXiv:2204.07118") for name, figures in _DEIT_III.items()}
    for size, (plain, registers) in _LINEAR.items():
        note = "linear classifier on frozen features, 224 pixels"
        found[f"dinov2_{size}14"] = Published(top1=plain, source="arXiv:2304.07193", note=note)
        found[f"dinov2_{size}14_reg4"] = Published(top1=registers, source="arXiv:2309.16588", note=note)
    return found


def _halved(flops: str) -> str:
    """Half of a printed number, with one digit more.

    >>> _halved("2.5")
    '1.25'
    """
    return f"{float(flops) / 2:.{len(flops.partition('.')[2]) + 1}f}"


PUBLISHED = _published()
