"""Constructor arguments of timm's ByobNet with halo or bottleneck attention, and of HaloAttn alone, to ours."""

from collections.abc import Mapping, Sequence
from typing import Any

from families.vit.config import activation
from official_config import Config, arguments, named_object

from models.core.errors import unknown_name
from models.families.halonet.model import POOLS
from models.layers.gate import rounded_channels

# The official defaults (timm/models/byobnet.py): of the constructor, of ByoModelCfg and of ByoBlockCfg.
_CALL: dict[str, Any] = {
    "num_classes": 1000,
    "in_chans": 3,
    "global_pool": None,
    "output_stride": 32,
    "img_size": None,
    "drop_rate": 0.0,
    "drop_block_rate": 0.0,
    "drop_block_size": 3,
    "drop_path_rate": 0.0,
    "zero_init_last": True,
    "device": None,
    "dtype": None,
}
_MODEL: dict[str, Any] = {
    "blocks": (),
    "downsample": "conv1x1",
    "stem_type": "3x3",
    "stem_pool": "maxpool",
    "stem_chs": 32,
    "width_factor": 1.0,
    "num_features": 0,
    "zero_init_last": True,
    "fixed_input_size": False,
    "act_layer": "relu",
    "norm_layer": "batchnorm",
    "aa_layer": "",
    "head_hidden_size": None,
    "head_type": "classifier",
    "attn_layer": None,
    "attn_kwargs": {},
    "self_attn_layer": None,
    "self_attn_kwargs": {},
    "block_kwargs": {},
}
_BLOCK: dict[str, Any] = {
    "type": None,
    "d": None,
    "c": None,
    "s": 2,
    "gs": None,
    "br": 1.0,
    "attn_layer": None,
    "attn_kwargs": None,
    "self_attn_layer": None,
    "self_attn_kwargs": None,
    "block_kwargs": None,
}
# What a reference file says besides of how its configuration was put together.
_DESCRIPTIONS = ("size", "chs", "block_size", "halo_size", "dim_head", "num_heads")
# Arguments of block classes: ours, and the default.
_BLOCK_OPTIONS: dict[str, dict[str, tuple[str, Any]]] = {
    "bottle": {
        "kernel_size": ("size", 3),
        "attn_last": ("gate_last", False),
        "linear_out": ("linear_out", False),
        "extra_conv": ("extra_conv", False),
        "bottle_in": ("ratio_of_input", False),
    },
    "self_attn": {
        "kernel_size": ("size", 3),
        "extra_conv": ("extra_conv", False),
        "linear_out": ("linear_out", False),
        "bottle_in": ("ratio_of_input", False),
        "post_attn_na": ("post_norm", True),
    },
}
_ATTENTION_OPTIONS: dict[str, dict[str, tuple[str, Any]]] = {
    "halo": {
        "num_heads": ("heads", 8),
        "dim_head": ("head_width", None),
        "block_size": ("block_size", 8),
        "halo_size": ("halo_size", 3),
        "qk_ratio": ("qk_ratio", 1.0),
        "qkv_bias": ("qkv_bias", False),
        "avg_down": ("average", False),
        "scale_pos_embed": ("scale_positions", False),
    },
    "bottleneck": {
        "num_heads": ("heads", 4),
        "dim_head": ("head_width", None),
        "qk_ratio": ("qk_ratio", 1.0),
        "qkv_bias": ("qkv_bias", False),
        "scale_pos_embed": ("scale_positions", False),
    },
}
_SHORTCUTS = {"conv1x1": "conv", "avg": "average", "": "none"}
_STEM_POOLS = {"": None, "max": "max", "maxpool": "max", "max2": "max2", "avg": "avg", "avgpool": "avg", "avg2": "avg2"}
# How many convolutions, the share of channels that each but the last has of the next, how many have no norm.
_STEMS = {"": (1, 1.0, 0), "3x3": (1, 1.0, 0), "7x7": (1, 1.0, 0), "deep": (3, 1.0, 0), "quad": (4, 0.5, 0)} | {
    "quad2": (4, 0.5, 2)
}


def halonet_options(config: Config) -> dict[str, Any]:
    """Keyword arguments of our HaloNet from those of timm's ByobNet.

    `cfg` is a ByoModelCfg as a dictionary, whose `blocks` are ByoBlockCfgs or lists of them; fields of it that stand
    beside `cfg` go before.

    Raises:
      ValueError: an argument, or a value of one, without a counterpart here; says what is allowed.
    """
    given = arguments(config)
    described = _filled("argument of timm's ByobNet", given.pop("cfg", {}), _MODEL)
    for name in _DESCRIPTIONS:
        given.pop(name, None)
    cfg = described | {name: given.pop(name) for name in list(given) if name in _MODEL and name not in _CALL}
    call = _filled("argument of timm's ByobNet", given, _CALL, also=_MODEL)
    _only("norm_layer", named_object(cfg["norm_layer"])[0].lower(), ("batchnorm", "batchnorm2d"))
    _only("aa_layer", cfg["aa_layer"] or "", ("",))
    _only("head_type", cfg["head_type"], ("classifier", ""))
    _only("head_hidden_size", cfg["head_hidden_size"], (None,))
    _only("drop_block_rate", call["drop_block_rate"], (0,))
    _only("act_layer", bool(cfg["act_layer"]), (True,))
    image = call["img_size"]
    stages = [_stage(entry, cfg) for entry in cfg["blocks"]]
    stem = _stem(cfg, first=stages[0]["width"] if stages else 0)
    _undilated(stem, stages, call["output_stride"])
    attends = any(layer.get("attention") == "bottleneck" for stage in stages for layer in stage["layers"])
    if image is None and (attends or cfg["fixed_input_size"]):
        raise ValueError("timm argument img_size=None: bottleneck attention, and fixed_input_size, need the image size")
    features = round(cfg["width_factor"] * cfg["num_features"]) if cfg["num_features"] else 0
    return {
        "widths": tuple(stage["width"] for stage in stages),
        "depths": tuple(len(stage["layers"]) for stage in stages),
        "strides": tuple(stage["stride"] for stage in stages),
        "layers": tuple(tuple(stage["layers"]) for stage in stages),
        **stem,
        "shortcut": _only("downsample", cfg["downsample"], _SHORTCUTS),
        "activation": activation(cfg["act_layer"]),
        "features": features,
        "pool": _only("global_pool", call["global_pool"] or "avg", {name: name for name in POOLS}),
        "image_size": 256 if image is None else image if isinstance(image, int) else tuple(image),
        "num_classes": call["num_classes"],
        "channels": call["in_chans"],
        "zero_last": call["zero_init_last"],
        "drop_path": call["drop_path_rate"],
        "head_dropout": call["drop_rate"],
    }


def halo_attention_options(config: Config) -> dict[str, Any]:
    """Keyword arguments of our HaloAttention from those of timm's HaloAttn.

    Raises:
      ValueError: an argument without a counterpart here.
    """
    own = {name: default for name, (_, default) in _ATTENTION_OPTIONS["halo"].items()}
    # The size of the map matters to bottleneck attention only.
    defaults = own | {"dim": None, "dim_out": None, "stride": 1, "feat_size": None, "device": None, "dtype": None}
    described = {name: value for name, value in arguments(config).items() if name != "size"}
    given = _filled("argument of timm's HaloAttn", described, defaults)
    options = {ours: given[name] for name, (ours, _) in _ATTENTION_OPTIONS["halo"].items()}
    return options | {"width": given["dim"], "width_out": given["dim_out"], "stride": given["stride"]}


def _stage(entry: Any, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Width, stride and layers of an entry of `blocks`."""
    entries = [entry] if isinstance(entry, Mapping) else list(entry)
    blocks = [_filled("field of timm's ByoBlockCfg", _named(block), _BLOCK) for block in entries]
    widths = {rounded_channels(block["c"] * cfg["width_factor"]) for block in blocks}
    if len(widths) != 1:
        raise ValueError(f"timm field c of the blocks of one stage: {sorted(widths)}; allowed: the same for all")
    layers = [layer for block in blocks for layer in [_layer(block, cfg)] * block["d"]]
    return {"width": widths.pop(), "stride": blocks[0]["s"], "layers": layers}


def _layer(block: Mapping[str, Any], cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A ByoBlockCfg as a layer of ours. What a block says replaces what the model says, whole."""
    kind = _only("type", block["type"], {name: name for name in _BLOCK_OPTIONS})
    said = {
        name: cfg[name] if block[name] is None else block[name]
        for name in ("attn_layer", "attn_kwargs", "self_attn_layer", "self_attn_kwargs", "block_kwargs")
    }
    options = _renamed("block_kwargs", said["block_kwargs"] or {}, _BLOCK_OPTIONS[kind])
    layer: dict[str, Any] = {"ratio": block["br"], "group_width": block["gs"] or 0, **options}
    if kind == "bottle":
        if said["attn_layer"]:
            layer["gate"] = _only("attn_layer", said["attn_layer"], {"se": "se", "eca": "eca"})
            layer["gate_options"] = _GATE_OPTIONS[layer["gate"]](said["attn_kwargs"] or {})
        return layer
    name = _only("self_attn_layer", said["self_attn_layer"] or "", {name: name for name in _ATTENTION_OPTIONS})
    inside = _renamed("self_attn_kwargs", said["self_attn_kwargs"] or {}, _ATTENTION_OPTIONS[name])
    heads = inside.pop("heads")
    return layer | {"attention": name, "heads": heads, "attention_options": inside}


def _squeeze_excite(given: Mapping[str, Any]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"rd_ratio": 1 / 16, "rd_channels": None, "rd_divisor": 8, "add_maxpool": False}
    defaults |= {"bias": True, "act_layer": "relu", "norm_layer": None, "gate_layer": "sigmoid"}
    found = _filled("argument of timm's SEModule", given, defaults)
    _only("add_maxpool", found["add_maxpool"], (False,))
    _only("norm_layer of SEModule", found["norm_layer"], (None,))
    return {
        "ratio": found["rd_ratio"],
        "hidden": found["rd_channels"],
        "divisor": found["rd_divisor"],
        "use_bias": found["bias"],
        "activation": activation(found["act_layer"]),
        "gate": activation(found["gate_layer"]),
    }


def _channel_attention(given: Mapping[str, Any]) -> dict[str, Any]:
    # With the number of channels known, timm takes the kernel's size from it; without an MLP it has no activation.
    defaults: dict[str, Any] = {"kernel_size": 3, "gamma": 2, "beta": 1, "act_layer": None, "gate_layer": "sigmoid"}
    defaults |= {"rd_ratio": 1 / 8, "rd_channels": None, "rd_divisor": 8, "use_mlp": False}
    found = _filled("argument of timm's EcaModule", given, defaults)
    _only("use_mlp", found["use_mlp"], (False,))
    return {"gamma": found["gamma"], "beta": found["beta"], "gate": activation(found["gate_layer"])}


_GATE_OPTIONS = {"se": _squeeze_excite, "eca": _channel_attention}


def _stem(cfg: Mapping[str, Any], first: int) -> dict[str, Any]:
    """Options of our stem."""
    kind = _only("stem_type", cfg["stem_type"], {name: name for name in (*_STEMS, "tiered")})
    pool = _only("stem_pool", (cfg["stem_pool"] or "").lower(), _STEM_POOLS)
    channels, factor = cfg["stem_chs"], cfg["width_factor"]
    plain = 0 if kind == "tiered" else _STEMS[kind][2]
    if isinstance(channels, Sequence):
        widths = tuple(round(width * factor) for width in channels)
        if kind == "tiered" or ((kind == "7x7" or len(widths) == 1) and not pool):
            raise ValueError(f"timm argument stem_chs={channels!r} does not go with stem_type={kind!r} and this pool")
        plain = max(len(widths) - 2, 0) if plain else 0
    else:
        width = round((channels or first) * factor)
        if kind == "tiered":
            widths = (3 * width // 8, width // 2, width)
        else:
            count, share, _ = _STEMS[kind]
            widths = tuple(round(width * share**number) for number in reversed(range(count)))
    return {"stem": widths, "stem_size": 7 if kind == "7x7" else 3, "stem_pool": pool, "stem_plain": plain}


def _undilated(stem: Mapping[str, Any], stages: Sequence[Mapping[str, Any]], output_stride: int) -> None:
    """timm dilates convolutions where the map would be smaller than a share of the image; there are none here."""
    reduction = 4 if stem["stem_pool"] or len(stem["stem"]) > 1 else 2
    for number, stage in enumerate(stages):
        if reduction >= output_stride and stage["stride"] > 1:
            raise ValueError(
                f"timm argument output_stride={output_stride}: the map is 1/{reduction} of the image before stage "
                f"{number}, whose stride would become a dilation, which has no counterpart here"
            )
        reduction *= stage["stride"]


def _named(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of an object whose first ones may be given by position."""
    return dict(zip(_BLOCK, given.get("_args", ()), strict=False)) | dict(given)


def _filled(
    what: str, given: Mapping[str, Any], defaults: Mapping[str, Any], also: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """What is given and otherwise the default; `also` are names for a message."""
    known = {name: value for name, value in given.items() if not name.startswith("_")}
    for name in known:
        if name not in defaults:
            raise ValueError(unknown_name(what, name, (*defaults, *also)))
    return {**defaults, **known}


def _renamed(what: str, given: Mapping[str, Any], options: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    found = _filled(f"entry of timm's {what}", given, {name: default for name, (_, default) in options.items()})
    return {ours: found[name] for name, (ours, _) in options.items()}


def _only(name: str, value: Any, allowed: Any) -> Any:
    """`value`, or what a mapping has for it. ValueError for any other than these."""
    if value not in allowed:
        names = ", ".join(repr(one) for one in allowed)
        raise ValueError(f"timm argument {name}={value!r} has no counterpart here; allowed: {names}")
    return allowed[value] if isinstance(allowed, Mapping) else value
