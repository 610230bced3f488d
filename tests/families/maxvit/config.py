"""Constructor arguments of timm's MaxxVit, and of the configuration objects it takes, to ours."""

from collections.abc import Mapping, Sequence
from typing import Any

from families.vit.config import activation
from official_config import Config, arguments, named_object

from models.core.errors import unknown_name
from models.families.maxvit.model import POOLS
from models.layers.pool import POOLS as HALVING

# The official defaults of the three objects (timm/models/maxxvit.py), where they matter to these models.
_MODEL: dict[str, Any] = {
    "embed_dim": (96, 192, 384, 768),
    "depths": (2, 3, 5, 2),
    "block_type": ("C", "C", "T", "T"),
    "stem_width": 64,
    "stem_bias": False,
    "conv_cfg": {},
    "transformer_cfg": {},
    "head_hidden_size": None,
    "weight_init": "vit_eff",
}
_CONV: dict[str, Any] = {
    "block_type": "mbconv",
    "expand_ratio": 4.0,
    "expand_output": True,
    "kernel_size": 3,
    "group_size": 1,
    "pre_norm_act": False,
    "output_bias": True,
    "stride_mode": "dw",
    "pool_type": "avg2",
    "downsample_pool_type": "avg2",
    "padding": "",
    "attn_early": False,
    "attn_layer": "se",
    "attn_act_layer": "silu",
    "attn_ratio": 0.25,
    "init_values": 1e-6,
    "act_layer": "gelu",
    "norm_layer": "",
    "norm_layer_cl": "",
    "norm_eps": None,
}
_TRANSFORMER: dict[str, Any] = {
    "dim_head": 32,
    "head_first": True,
    "expand_ratio": 4.0,
    "expand_first": True,
    "shortcut_bias": True,
    "attn_bias": True,
    "attn_drop": 0.0,
    "proj_drop": 0.0,
    "pool_type": "avg2",
    "rel_pos_type": "bias",
    "rel_pos_dim": 512,
    "partition_ratio": 32,
    "window_size": None,
    "grid_size": None,
    "no_block_attn": False,
    "use_nchw_attn": False,
    "init_values": None,
    "act_layer": "gelu",
    "norm_layer": "layernorm2d",
    "norm_layer_cl": "layernorm",
    "norm_eps": 1e-6,
}
_CALL: dict[str, Any] = {
    "img_size": 224,
    "in_chans": 3,
    "num_classes": 1000,
    "global_pool": "avg",
    "drop_rate": 0.0,
    "drop_path_rate": 0.0,
}
# How a new model starts and where.
_NOT_NEEDED = ("device", "dtype")
_BLOCK_TYPES = ("M",)
_POOLS = {name: name for name in POOLS} | {"fast": "avg"} | {f"fast{name}": name for name in POOLS}
_POSITIONS = {"bias_tf": True, "": False, "none": False}
_STRIDES_AT = {"dw": "depthwise", "1x1": "expand", "pool": "pool"}
_PADDINGS = {"same": "same", "": "centred"}
_SCHEMES = ("", "normal", "trunc_normal", "vit_eff", "xavier_normal")


def maxvit_options(config: Config) -> dict[str, Any]:
    """Keyword arguments of our MaxViT from those of timm's MaxxVit.

    `cfg` (or `full_cfg`, where `cfg` is a description) is a MaxxVitCfg as a dictionary, in it `conv_cfg` and
    `transformer_cfg`; fields of the three that stand beside it go before, those of the latter two with `conv_` and
    `transformer_` before their names, as in timm. Without any, they are those of `maxvit_*_tf`.

    Raises:
      ValueError: an argument, or a value of one, without a counterpart here; says what is allowed.
    """
    call, model, convolution, transformer = _gathered(config)
    return {
        **_whole(call, model),
        **_transformer(transformer, call["img_size"]),
        "convolution": _convolution(convolution),
        "norm_eps": transformer["norm_eps"],
    }


def _whole(call: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """What is said once for the model."""
    blocks = {kind for entry in model["block_type"] for kind in ([entry] if isinstance(entry, str) else entry)}
    for kind in blocks:
        _choice("block_type", kind, _BLOCK_TYPES)
    depths, widths = tuple(model["depths"]), tuple(model["embed_dim"])
    if not len(model["block_type"]) == len(depths) == len(widths):
        raise ValueError(f"timm arguments embed_dim={widths}, depths={depths}, block_type: one entry for each stage")
    _choice("weight_init", model["weight_init"], _SCHEMES)
    return {
        "widths": widths,
        "depths": depths,
        "stem_widths": model["stem_width"],
        "stem_bias": model["stem_bias"],
        "pre_logits": model["head_hidden_size"] or None,
        "image_size": call["img_size"] if isinstance(call["img_size"], int) else tuple(call["img_size"]),
        "channels": call["in_chans"],
        "num_classes": call["num_classes"],
        "pool": _choice("global_pool", call["global_pool"], _POOLS),
        "head_dropout": call["drop_rate"],
        "drop_path": call["drop_path_rate"],
    }


def _convolution(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of a MaxxVitConvCfg: options of our MBConv."""
    _choice("conv_cfg.block_type", given["block_type"], ("mbconv",))
    _choice("conv_cfg.norm_layer", given["norm_layer"], ("", "batchnorm2d"))
    gate = _choice("conv_cfg.attn_layer", given["attn_layer"] or "", {"se": True, "": False})
    padding = _choice("conv_cfg.padding", given["padding"], _PADDINGS)
    if padding == "centred" and given["kernel_size"] % 2 == 0:
        raise ValueError(f"timm argument conv_cfg.kernel_size={given['kernel_size']}; allowed: odd, or padding='same'")
    pools = {name: name for name in HALVING}
    return {
        "expansion": given["expand_ratio"],
        "expand_output": given["expand_output"],
        "size": given["kernel_size"],
        "group_size": given["group_size"] or 0,
        "gate_ratio": given["attn_ratio"],
        "gate_activation": activation(given["attn_act_layer"]),
        "gate_at": ("before_norm" if given["attn_early"] else "after_norm") if gate else "none",
        "stride_at": _choice("conv_cfg.stride_mode", given["stride_mode"], _STRIDES_AT),
        "shortcut_pool": _choice("conv_cfg.pool_type", given["pool_type"], pools),
        "stride_pool": _choice(
            "conv_cfg.downsample_pool_type", given["downsample_pool_type"] or given["pool_type"], pools
        ),
        "padding": padding,
        "activation": activation(given["act_layer"]),
        "pre_norm_activation": given["pre_norm_act"],
        "output_bias": given["output_bias"],
        "norm_eps": 1e-5 if given["norm_eps"] is None else given["norm_eps"],
    }


def _transformer(given: Mapping[str, Any], image_size: int | Sequence[int]) -> dict[str, Any]:
    """Of a MaxxVitTransformerCfg. What is for blocks of other kinds than MaxViT's is passed over."""
    for name, allowed in (
        ("head_first", (False,)),
        ("use_nchw_attn", (False,)),
        ("norm_layer", ("layernorm2d", "layernorm")),
        ("norm_layer_cl", ("layernorm",)),
    ):
        _choice(f"transformer_cfg.{name}", given[name], allowed)
    positions = _choice("transformer_cfg.rel_pos_type", given["rel_pos_type"] or "", _POSITIONS)
    sides = _pair(image_size)
    window, grid = given["window_size"], given["grid_size"]
    if window is None:
        # timm then takes no notice of grid_size.
        window = grid = [side // given["partition_ratio"] for side in sides]
    return {
        "head_width": given["dim_head"],
        "window": _pair(window),
        "grid_window": _pair(window if grid is None else grid),
        "mlp_ratio": given["expand_ratio"],
        "activation": activation(given["act_layer"]),
        "attention_options": None if positions else {"relative_bias": False},
        "block_attention": not given["no_block_attn"],
        "qkv_bias": given["attn_bias"],
        "proj_bias": given["attn_bias"],
        "layer_scale": given["init_values"] or None,
        "dropout": given["proj_drop"],
        "attention_dropout": given["attn_drop"],
    }


def _gathered(config: Config) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Arguments of the call, of the model's object, and of the two in it, each with the official defaults."""
    given = arguments(config)
    described = [given.pop(key) for key in ("full_cfg", "cfg") if isinstance(given.get(key), Mapping)]
    given.pop("cfg", None)
    # Descriptions in reference files; what they say is in the objects, or follows from the image.
    given.pop("conv", None)
    window, head_width = given.pop("window_size", None), given.pop("dim_head", None)
    if described:
        cfg = _object("MaxxVitCfg", described[0], _MODEL)
        convolution = _object("MaxxVitConvCfg", cfg["conv_cfg"], _CONV)
        transformer = _object("MaxxVitTransformerCfg", cfg["transformer_cfg"], _TRANSFORMER)
    else:
        cfg = _MODEL | {"block_type": ("M",) * len(given.get("depths", _MODEL["depths"])), "stem_bias": True}
        convolution = _CONV | {"norm_eps": 1e-3, "act_layer": "gelu_tanh", "padding": "same"}
        transformer = _TRANSFORMER | {"norm_eps": 1e-5, "act_layer": "gelu_tanh", "head_first": False}
        transformer |= {"rel_pos_type": "bias_tf", "window_size": window, "dim_head": head_width or 32}
    call = dict(_CALL)
    for key, value in given.items():
        if key in _CALL:
            call[key] = value
        elif key in _MODEL and key not in ("conv_cfg", "transformer_cfg"):
            cfg[key] = value
        elif key.startswith("conv_") and key.removeprefix("conv_") in _CONV:
            convolution[key.removeprefix("conv_")] = value
        elif key.startswith("transformer_") and key.removeprefix("transformer_") in _TRANSFORMER:
            transformer[key.removeprefix("transformer_")] = value
        elif key not in _NOT_NEEDED:
            raise ValueError(unknown_name("argument of timm's MaxxVit", key, (*_CALL, *_MODEL, *_NOT_NEEDED)))
    return call, cfg, convolution, transformer


def _object(kind: str, value: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration object written as a dictionary; defaults filled in."""
    name, fields = named_object(value)
    if name not in ("", kind):
        raise ValueError(f"configuration object {name!r} where timm's MaxxVit takes a {kind}")
    for field in fields:
        if field not in defaults:
            raise ValueError(unknown_name(f"field of timm's {kind}", field, defaults))
    return dict(defaults) | fields


def _choice(name: str, value: Any, allowed: Any) -> Any:
    """What a value is here. ValueError that lists the allowed ones."""
    if value not in allowed:
        raise ValueError(
            f"timm argument {name}={value!r} has no counterpart here; allowed: {', '.join(map(repr, allowed))}"
        )
    return allowed[value] if isinstance(allowed, Mapping) else value


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
