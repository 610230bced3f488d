"""Our variants as timm's PyTorch models (extra `bench`): what they are called there, and how one is made."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
import types
from typing import Any

SIZES = {
    "ti": "tiny",
    "s": "small",
    "m": "medium",
    "b": "base",
    "l": "large",
    "h": "huge",
    "g": "giant",
    "gopt": "giantopt",
    "G": "gigantic",
    "so400m": "so400m",
}
# Of `vit_{size}{patch}` timm has these; of the CLIP towers and DINOv2 all that there are here.
VIT = ("ti16", "s8", "s16", "s32", "b8", "b16", "b32", "l14", "l16", "l32", "h14", "g14", "G14")
# SigLIP's towers are for 256 pixels there, but for two; a model of ours has the positions of its own image size.
SIGLIP = {"b16": 224, "so400m14": 224}
SWIN_WINDOW = {224: 7, 384: 12}


def timm_name(variant: str) -> str | None:
    """What timm calls the model of a variant; None where it has none."""
    for pattern, rename in _RULES.items():
        if match := re.fullmatch(pattern, variant):
            return rename(match)
    return None


def _vit(match: re.Match[str]) -> str | None:
    family, size, patch, kind = match["family"], SIZES.get(match["size"]), match["patch"], match["kind"] or ""
    short = f"{match['size']}{patch}"
    if size is None or (family == "vit" and not kind and short not in VIT):
        return None
    if family == "dinov2":
        return f"vit_{size}_patch{patch}{kind}_dinov2"
    if kind == "_siglip":
        return f"vit_{size}_patch{patch}_siglip_{SIGLIP.get(short, 256)}"
    if kind == "_clip":
        return f"vit_{size}_patch{patch}_clip_224"
    return f"{family}_{size}{kind}_patch{patch}_224"


_RULES = {
    r"vit_(wee|little|medium|betwixt)16_reg(\d)": lambda m: f"vit_{m[1]}_patch16_reg{m[2]}_gap_256",
    r"(?P<family>vit|deit3?|dinov2)_(?P<size>[a-zA-Z]+|so400m)(?P<patch>\d+)"
    r"(?P<kind>_distilled|_reg4|_siglip|_clip)?": _vit,
    r"swin_(\w+?)(?:_(384))?": lambda m: f"swin_{m[1]}_patch4_window{SWIN_WINDOW[int(m[2] or 224)]}_{m[2] or 224}",
    r"maxvit_(tiny|small|base|large|xlarge)(?:_(\d+))?": lambda m: f"maxvit_{m[1]}_tf_{m[2] or 224}",
    r"volo_(d\d)(?:_(\d+))?": lambda m: f"volo_{m[1]}_{m[2] or 224}",
    r"davit_(tiny|small|base|large|huge|giant|base_fl|huge_fl)": lambda m: f"davit_{m[1]}",
    r"(halonet26t|halonet50ts|sehalonet33ts|halonet_h1|eca_halonext26ts|haloregnetz_b)": lambda m: m[1],
    r"halo2botnet50ts": lambda m: "halo2botnet50ts_256",
}


def create(name: str, **options: Any) -> Any:
    """timm's model of that name, whether or not torchvision is there."""
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.insert(0, _NoTorchvision())
    import timm

    return timm.create_model(name, **options)


def size_options(name: str, side: int) -> dict[str, int]:
    """What `create` has to be told so that timm's model takes square images of `side` pixels."""
    import timm

    own = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return {} if own is None or own.input_size[1] == side else {"img_size": side}


class _NoTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for torchvision, which has no CPU build everywhere and which these models do not use."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None
        )

    def create_module(self, spec: Any) -> types.ModuleType:
        class Anything(types.ModuleType):
            def __getattr__(self, name: str) -> Any:
                if name.startswith("__"):
                    raise AttributeError(name)
                modes = {"NEAREST": 0, "LANCZOS": 1, "BILINEAR": 2, "BICUBIC": 3, "BOX": 4, "HAMMING": 5}
                return type(name, (), {"__getattr__": lambda _, __: None, **modes})

        return Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []
