"""BiFormer, BiFormerSTL and their attention alone, tied to the official implementation."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from families.biformer.config import attention_options, biformer_options, is_nchw
from official_config import Config
from references import Reference, Values

from attn import Grid
from models.attention.bilevel_routing import BiLevelRoutingAttention
from models.core.call import Call
from models.families.biformer.model import BiFormer
from models.families.biformer.weights import bilevel_rows
from models.weights.table import Table


def evaluate_biformer(model: BiFormer, inputs: Values, config: Config, stages: Sequence[str]) -> Values:
    """Logits (features without classes) as `y`, and the outputs of the official modules, maps `[B, C, Y, X]`.

    Blocks of BiFormerSTL keep channels last.
    """
    firsts = [stage.blocks.first for stage in model.stages]
    blocks = {(i, j): first + j for i, first in enumerate(firsts) for j in range(model.stages[i].blocks.depth)}
    outputs = model.features(_channels_last(inputs["x"]), layers=list(blocks.values()))
    last = outputs[f"stages.{len(firsts) - 1}"]
    named = {
        "norm": _channels_first(outputs["tokens"].reshape(last.shape)),
        "head": outputs["logits" if "logits" in outputs else "pooled"],
    }
    for i in range(len(firsts)):
        named[f"downsample_layers.{i}"] = _channels_first(outputs[f"stages.{i}.embedded"])
        named[f"stages.{i}"] = _channels_first(outputs[f"stages.{i}"])
    for i, j in blocks:
        tokens = outputs[f"stages.{i}.blocks.{j}"].reshape(outputs[f"stages.{i}"].shape)
        named[f"stages.{i}.{j}"] = _channels_first(tokens)
        named[f"stages.{i}.blocks.{j}"] = _channels_first(tokens) if is_nchw(config) else tokens
    return {"y": named["head"]} | {module: named[module] for module in stages}


def evaluate_attention(model: BiLevelRoutingAttention, inputs: Values, config: Config, stages: Sequence[str]) -> Values:
    """The output as `y`, in the layout of the input."""
    x = _channels_last(inputs["x"]) if is_nchw(config) else inputs["x"]
    y = model(x.reshape(x.shape[0], -1, x.shape[-1]), Call(Grid(x.shape[1:3]))).reshape(x.shape)
    return {"y": _channels_first(y) if is_nchw(config) else y}


def attention_table(model: BiLevelRoutingAttention) -> Table:
    """Names of BiLevelRoutingAttention, or of nchwBRA for an attention that pads what is projected."""
    return Table(bilevel_rows("", "", nchw=model.padding == "projected"))


def _channels_last(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, 1, -1)


def _channels_first(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, -1, 1)


REFERENCES = (
    Reference(
        name="biformer",
        options=biformer_options,
        golden=("biformer*",),
        evaluate=evaluate_biformer,
        stacked=True,
        sized=True,
    ),
    Reference(
        name="bilevel_routing",
        module=(BiLevelRoutingAttention, attention_table),
        options=attention_options,
        golden=("bra_legacy*", "bra_nchw*"),
        evaluate=evaluate_attention,
    ),
)
