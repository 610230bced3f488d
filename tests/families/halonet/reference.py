"""HaloNets and halo attention alone, tied to timm's."""

from collections.abc import Sequence

import jax
from families.halonet.config import halo_attention_options, halonet_options
from official_config import Config
from references import Reference, Values

from attn import Grid
from models.attention.halo import HaloAttention
from models.core.call import Call
from models.families.halonet.model import HaloNet
from models.families.halonet.weights import attention_rows
from models.weights.table import Table


def evaluate_halonet(model: HaloNet, inputs: Values, config: Config, stages: Sequence[str]) -> Values:
    """Logits (features without classes) as `y`, and the outputs of timm's modules, maps `[B, C, Y, X]`."""
    outputs = model.features(inputs["x"].transpose(0, 2, 3, 1), layers=range(model.depth))
    last = outputs[f"stages.{len(model.stages) - 1}"]
    named = {
        "stem": _channels_first(outputs["embedded"]),
        "stages": _channels_first(last),
        "final_conv": _channels_first(outputs["tokens"].reshape(*last.shape[:3], -1)),
        "head.global_pool": outputs["pooled"],
        "head": outputs["logits" if "logits" in outputs else "pooled"],
    }
    for number, stage in enumerate(model.stages):
        name = f"stages.{number}"
        named[name] = _channels_first(outputs[name])
        for layer in range(stage.depth):
            tokens = outputs[f"{name}.blocks.{layer - 1}" if layer else f"{name}.first"]
            named[f"{name}.{layer}"] = _channels_first(tokens.reshape(outputs[name].shape))
    return {"y": named["head"]} | {module: named[module] for module in stages}


def evaluate_halo_attention(model: HaloAttention, inputs: Values, config: Config, stages: Sequence[str]) -> Values:
    """The map `[B, C, Y, X]` as `y`."""
    x = inputs["x"]
    batch, width, *sides = x.shape
    out = model(x.transpose(0, 2, 3, 1).reshape(batch, -1, width), Call(Grid(tuple(sides))))
    return {"y": _channels_first(out.reshape(batch, *(side // model.stride for side in sides), -1))}


def _channels_first(x: jax.Array) -> jax.Array:
    return x.transpose(0, 3, 1, 2)


REFERENCES = (
    Reference(
        name="halonet",
        options=halonet_options,
        golden=("halonet", "halonet[0-9]*", "halonet_*"),
        evaluate=evaluate_halonet,
        stacked=True,
        sized=True,
    ),
    Reference(
        name="halo_attention",
        module=(HaloAttention, lambda model: Table(attention_rows("", ""))),
        options=halo_attention_options,
        golden=("halo_attn*",),
        evaluate=evaluate_halo_attention,
    ),
)
