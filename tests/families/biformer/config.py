"""Constructor arguments of the official BiFormer, BiFormerSTL, BiLevelRoutingAttention and nchwBRA to ours.

https://github.com/rayleizhu/BiFormer: models/families/biformer/model.py, biformer_stl.py, biformer_stl_nchw.py,
ops/bra_legacy.py, ops/bra_nchw.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from official_config import arguments, named_object

from models.core.errors import unknown_name

Config = Mapping[str, Any]

_TOPK = {-1: "dense", -2: "local_dense", 0: "convolution"}
_POOLING = {
    "identity": None,
    "ada_avgpool": "adaptive_average",
    "ada_maxpool": "adaptive_max",
    "avgpool": "average",
    "maxpool": "max",
}
_NORMS = {"BatchNorm2d": "batch", "LayerNorm2d": "layer"}
# (soft_routing, diff_routing, param_routing) that the official attention can be called with.
_ROUTINGS = {
    (False, False, False): "hard",
    (True, False, False): "soft_detached",
    (True, True, False): "soft",
    (True, True, True): "learned",
}
# What every model takes, with or without an effect.
_COMMON: dict[str, Any] = {
    "in_chans": 3,
    "num_classes": 1000,
    "head_dim": 32,
    "qk_scale": None,
    "drop_path_rate": 0.0,
    "drop_rate": 0.0,
    "use_checkpoint_stages": (),
    "mlp_ratios": (4, 4, 4, 4),
    "side_dwconv": 5,
}
_BIFORMER: dict[str, Any] = _COMMON | {
    "depth": (3, 4, 8, 3),
    "embed_dim": (64, 128, 320, 512),
    "head_dim": 64,
    "representation_size": None,
    "n_win": 7,
    "kv_downsample_mode": "ada_avgpool",
    "kv_per_wins": (2, 2, -1, -1),
    "topks": (8, 8, -1, -1),
    "layer_scale_init_value": -1,
    "qk_dims": (None, None, None, None),
    "param_routing": False,
    "diff_routing": False,
    "soft_routing": False,
    "pre_norm": True,
    "pe": None,
    "pe_stages": (0,),
    "before_attn_dwconv": 3,
    "auto_pad": False,
    "kv_downsample_kernels": (4, 2, 1, 1),
    "kv_downsample_ratios": (4, 2, 1, 1),
    "param_attention": "qkvo",
    "mlp_dwconv": False,
}
_STL: dict[str, Any] = _COMMON | {
    "depth": (2, 2, 6, 2),
    "embed_dim": (96, 192, 384, 768),
    "norm_layer": "LayerNorm2d",
    "pre_head_norm_layer": None,
    "n_wins": (7, 7, 7, 7),
    "topks": (1, 4, 16, -2),
}
_LEGACY: dict[str, Any] = {
    "dim": None,
    "num_heads": 8,
    "n_win": 7,
    "qk_dim": None,
    "qk_scale": None,
    "kv_per_win": 4,
    "kv_downsample_ratio": 4,
    "kv_downsample_kernel": None,
    "kv_downsample_mode": "identity",
    "topk": 4,
    "param_attention": "qkvo",
    "param_routing": False,
    "diff_routing": False,
    "soft_routing": False,
    "side_dwconv": 3,
    "auto_pad": False,
}
_NCHW: dict[str, Any] = {
    name: _LEGACY[name] for name in ("dim", "num_heads", "n_win", "qk_scale", "topk", "side_dwconv", "auto_pad")
} | {"attn_backend": "torch"}


def biformer_options(config: Config) -> dict[str, Any]:
    """Keyword arguments of our BiFormer from those of BiFormer, BiFormerSTL or nchwBiFormerSTL; `cls` says which.

    `drop_rate`, `pe_stages` and `kv_downsample_kernels` have no effect there and none here; neither has
    `use_checkpoint_stages` on any number.

    Raises:
      ValueError: an argument, or a value of one, without a counterpart here.
    """
    name = str(config.get("cls", ""))
    return _stl_options(config, name) if "STL" in name or "n_wins" in config else _biformer_options(config)


def attention_options(config: Config) -> dict[str, Any]:
    """Keyword arguments of our BiLevelRoutingAttention from those of the official class of that name, or of nchwBRA.

    Raises:
      ValueError: an argument, or a value of one, without a counterpart here.
    """
    if is_nchw(config):
        given = _given(config, _NCHW)
        _only(given, "attn_backend", ("torch",))
        if (given["qk_scale"] or 0) < 0:
            raise ValueError(f"qk_scale={given['qk_scale']} of nchwBRA has no counterpart here; allowed: 0 and more")
        options: dict[str, Any] = {"padding": "projected"}  # whatever auto_pad says: the official code does not read it
    else:
        given = _given(config, _LEGACY)
        options = _bilevel(given, [given["kv_per_win"]], [given["kv_downsample_ratio"]])
        options["pool_size"] = options.pop("pool_sizes")[0]
        options |= {"qk_width": given["qk_dim"] or None, "padding": "input" if given["auto_pad"] else None}
    if given["dim"] is None:
        raise ValueError("dim: the official attention cannot be made without")
    return options | {
        "width": given["dim"],
        "heads": given["num_heads"],
        "regions": given["n_win"],
        "topk": given["topk"],
        "scale": given["qk_scale"] or None,
        "local": _side("side_dwconv", given["side_dwconv"]),
    }


def is_nchw(config: Config) -> bool:
    """Whether the official class keeps channels before rows and columns inside (nchwBRA, nchwBiFormerSTL)."""
    return "nchw" in str(config.get("cls", ""))


def _biformer_options(config: Config) -> dict[str, Any]:
    given = _given(config, _BIFORMER)
    _only(given, "representation_size", (None, 0))
    _only(given, "pe", (None, "none"))
    if given["before_attn_dwconv"] > 0:
        _only(given, "before_attn_dwconv", (3, 0))
    if None in given["qk_dims"]:
        raise ValueError(f"qk_dims={given['qk_dims']!r}: the official model needs a number for each stage")
    options = _bilevel(given, given["kv_per_wins"], given["kv_downsample_ratios"])
    options |= {
        "qk_widths": tuple(given["qk_dims"]),
        "scale": given["qk_scale"] or None,
        "auto_pad": given["auto_pad"],
        "regions": given["n_win"],
        "block": "pre_norm" if given["pre_norm"] else "norm_after",
        "positions": given["before_attn_dwconv"] > 0,
        "mlp": "depthwise" if given["mlp_dwconv"] else "mlp",
        "layer_scale": given["layer_scale_init_value"] if given["layer_scale_init_value"] > 0 else None,
    }
    return options | _stages(given, given["qk_dims"], _TOPK)


def _stl_options(config: Config, name: str) -> dict[str, Any]:
    given = _given(config, _STL)
    if "norm_layer" not in config and "norm_layer=BatchNorm2d" in name:
        given["norm_layer"] = "BatchNorm2d"
    given["pre_head_norm_layer"] = given["pre_head_norm_layer"] or given["norm_layer"]
    norms = []
    for key in ("norm_layer", "pre_head_norm_layer"):
        kind, own = named_object(given[key])
        if kind not in _NORMS or own:
            raise ValueError(f"{key}={given[key]!r} has no counterpart here; allowed: {', '.join(_NORMS)}")
        norms.append(_NORMS[kind])
    if isinstance(given["n_wins"], int):
        raise ValueError(f"n_wins={given['n_wins']}: the official model needs a number for each stage")
    options = {
        "layout": "patches",
        "positions": False,
        "regions": tuple(given["n_wins"]),
        "norm": norms[0],
        "head_norm": norms[1],
    }
    if not is_nchw(config):
        return options | _stages(given, given["embed_dim"], _TOPK)
    options |= {"local_of": "values", "attention_options": {"padding": "projected"}}
    # Its dense attention is made with the default side of the kernel.
    return options | _stages(given, given["embed_dim"], {-1: "local_dense"})


def _stages(given: Config, qk_widths: Sequence[int], mechanisms: Mapping[int, str]) -> dict[str, Any]:
    topks = given["topks"]
    if isinstance(topks, int) or any(topk <= 0 and topk not in mechanisms for topk in topks):
        codes = ", ".join(f"{code} ({name})" for code, name in mechanisms.items())
        raise ValueError(f"topks={topks!r}; allowed for each stage: a number of regions, {codes}")
    return {
        "widths": tuple(given["embed_dim"]),
        "depths": tuple(given["depth"]),
        # Everything but bi-level routing is made with its default of 8 heads.
        "heads": tuple(
            width // given["head_dim"] if topk > 0 else 8 for width, topk in zip(qk_widths, topks, strict=True)
        ),
        "attention": tuple("bilevel_routing" if topk > 0 else mechanisms[topk] for topk in topks),
        "topk": tuple(max(topk, 0) for topk in topks),
        "mlp_ratio": tuple(given["mlp_ratios"]),
        "local": _side("side_dwconv", given["side_dwconv"]),
        "num_classes": given["num_classes"],
        "channels": given["in_chans"],
        "drop_path": given["drop_path_rate"],
    }


def _bilevel(given: Config, per_region: Sequence[int], ratios: Sequence[int]) -> dict[str, Any]:
    """Routing, pooling and projection of the attention of bra_legacy."""
    chosen = tuple(bool(given[name]) for name in ("soft_routing", "diff_routing", "param_routing"))
    if chosen not in _ROUTINGS:
        soft, differentiable, learned = chosen
        raise ValueError(
            f"soft_routing={soft}, diff_routing={differentiable}, param_routing={learned}: not in the official code "
            "either; allowed: none of them, soft, soft and diff, all three"
        )
    mode = given["kv_downsample_mode"]
    if mode not in _POOLING:
        raise ValueError(unknown_name("kv_downsample_mode", mode, _POOLING))
    _only(given, "param_attention", ("qkvo", "qkv"))
    sizes = per_region if mode.startswith("ada_") else [max(ratio or 1, 1) for ratio in ratios]
    return {
        "routing": _ROUTINGS[chosen],  # type: ignore[index]
        "pooling": _POOLING[mode],
        "pool_sizes": tuple(sizes),
        "projection": given["param_attention"] == "qkvo",
    }


def _given(config: Config, defaults: Config) -> dict[str, Any]:
    given = arguments(config, defaults)
    for key in given:
        if key not in defaults:
            raise ValueError(unknown_name("argument of the official class", key, defaults))
    return given


def _only(given: Config, key: str, allowed: Sequence[Any]) -> None:
    if given[key] not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ValueError(f"{key}={given[key]!r} has no counterpart here; allowed: {choices}")


def _side(key: str, side: int) -> int:
    """Side of a depthwise kernel, 0 for none."""
    if side > 0 and side % 2 == 0:
        raise ValueError(f"{key}={side}: the official sum fails for an even kernel; allowed: odd numbers, 0 for none")
    return max(side, 0)
