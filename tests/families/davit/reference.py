"""DaViT, tied to timm's implementation."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from families.swin.reference import timm_pool
from official_config import Config, arguments, named_object
from references import Reference, Values

from models.core.errors import unknown_name
from models.families.davit.model import DUAL, DualAttentionTransformer
from models.families.davit.weights import places

_RENAMED = {
    "in_chans": "channels",
    "embed_dims": "widths",
    "num_heads": "heads",
    "window_size": "window",
    "down_kernel_size": "downsample_size",
    "head_norm_first": "norm_first",
    "ffn": "feed_forward",
    "drop_rate": "head_dropout",
    "drop_path_rate": "drop_path",
}
_SAME = ("depths", "mlp_ratio", "qkv_bias", "norm_eps", "num_classes", "named_blocks")
_TRANSLATED = ("attn_types", "cpe_act", "channel_attn_v2", "global_pool", "norm_layer", "norm_layer_cl")
_NOT_NEEDED = ("device", "dtype")
_MECHANISMS = dict(zip(("spatial", "channel"), DUAL, strict=True))
_NORMS = ("layernorm2d", "layernorm", "layernorm2dfp32", "layernormfp32")
_DEFAULTS: Config = {
    "depths": (1, 1, 3, 1),
    "embed_dims": (96, 192, 384, 768),
    "num_heads": (3, 6, 12, 24),
    "attn_types": ("spatial", "channel"),
    "global_pool": "avg",
}


def davit_options(config: Config) -> dict[str, Any]:
    """Keyword arguments of our DualAttentionTransformer from those of timm's DaVit.

    Raises:
      ValueError: an argument, or a value of one, without a counterpart here.
    """
    given = arguments(config, _DEFAULTS)
    options: dict[str, Any] = {}
    for key, value in given.items():
        value = tuple(value) if isinstance(value, list) else value
        if key in _SAME:
            options[key] = value
        elif key in _RENAMED:
            options[_RENAMED[key]] = value
        elif key not in _TRANSLATED and key not in _NOT_NEEDED:
            known = (*_SAME, *_RENAMED, *_TRANSLATED, *_NOT_NEEDED)
            raise ValueError(unknown_name("argument of timm's DaVit", key, known))
    for key in ("norm_layer", "norm_layer_cl"):
        if named_object(given.get(key, "layernorm"))[0].lower() not in _NORMS:
            allowed = ", ".join(_NORMS)
            raise ValueError(f"timm argument {key}={given[key]!r} has no counterpart here; allowed: {allowed}")
    types = tuple(given["attn_types"])
    for name in types:
        if name not in _MECHANISMS:
            raise ValueError(unknown_name("value of timm argument attn_types", name, _MECHANISMS))
    if given.get("named_blocks") and len(set(types)) < len(types):
        raise ValueError(f"timm argument attn_types={types!r}: named blocks need different names")
    options["attention"] = tuple(_MECHANISMS[name] for name in types)
    options["channel_version"] = 2 if given.get("channel_attn_v2") else 1
    options["position_activation"] = "gelu" if given.get("cpe_act") else None
    options["pool"] = timm_pool(given["global_pool"])
    return options


def evaluate_davit(model: DualAttentionTransformer, inputs: Values, config: Config, stages: Sequence[str]) -> Values:
    """Logits (features without classes) as `y`, and the outputs of timm's modules, maps `[B, C, Y, X]`."""
    outputs = model.features(inputs["x"].transpose(0, 2, 3, 1), layers=range(model.depth))
    named: Values = {"stem": _channels_first(outputs["embedded"])}
    members = len(model.options.members)
    for i, stage in enumerate(model.stages):
        shape = outputs[f"stages.{i}"].shape
        named[f"stages.{i}"] = _channels_first(outputs[f"stages.{i}"])
        named[f"stages.{i}.downsample"] = _channels_first(outputs[f"stages.{i}.embedded"])
        for layer, place in enumerate(places(model, stage.depth)):
            x = _channels_first(outputs[f"stages.{i}.blocks.{layer}"].reshape(shape))
            named[f"stages.{i}.blocks.{place}"] = x
            named[f"stages.{i}.blocks.{layer // members}"] = named[f"stages.{i}.blocks"] = x
    last = outputs[f"stages.{len(model.stages) - 1}"].shape
    pooled = outputs["pooled"]
    named |= {
        "stages": named[f"stages.{len(model.stages) - 1}"],
        "norm_pre": _channels_first(outputs["tokens"].reshape(last)),
        "head.norm": jnp.expand_dims(pooled, (2, 3)),
        "head": outputs["logits" if "logits" in outputs else "pooled"],
    }
    named["head.fc"] = named["head"]
    return {"y": named["head"]} | {module: named[module] for module in stages}


def _channels_first(x: jax.Array) -> jax.Array:
    return x.transpose(0, 3, 1, 2)


REFERENCES = (
    Reference(
        name="davit",
        options=davit_options,
        golden=("davit", "davit[0-9]*", "davit_*"),
        evaluate=evaluate_davit,
        stacked=True,
    ),
)
