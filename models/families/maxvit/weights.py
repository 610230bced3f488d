"""Weight names of MaxViT in timm (`maxvit_*_tf_*`) and in google-research/maxvit, TensorFlow checkpoints."""

import re
from collections.abc import Iterator

import numpy as np

from models.families.maxvit.model import MaxViT
from models.weights.family import Dialect
from models.weights.table import Flat, Row, Table, batch_norm, conv, copy, custom, linear, norm, pointwise
from models.weights.wrappings import AVERAGE

_HALVES = ("attn_block", "attn_grid")
_LEAVES = ("weight", "bias")


def _layers(model: MaxViT) -> Iterator[tuple[int, int, str]]:
    """(stage, block, our name): theirs count the first layer of a stage among its blocks."""
    for number, stage in enumerate(model.stages):
        for block in range(stage.depth):
            yield number, block, f"stages.{number}." + (f"blocks.{block - 1}" if block else "first")


# --- timm -------------------------------------------------------------------------------------------------------------


def maxvit_table(model: MaxViT) -> Table:
    """Names and layouts of timm's MaxxVit."""
    head = "head." if model.pre_logits is not None else ""
    return Table(
        conv("stem.conv1", "patch_embed.conv1"),
        batch_norm("stem.norm1", "patch_embed.norm1"),
        conv("stem.conv2", "patch_embed.conv2"),
        *(_layer(f"stages.{stage}.blocks.{block}", ours, model) for stage, block, ours in _layers(model)),
        norm(f"{head}norm", "norm"),
        linear("head.pre_logits.fc", "pre_logits"),
        linear("head.fc", "head"),
    )


def _layer(theirs: str, ours: str, model: MaxViT) -> Iterator[Row]:
    gate = "se_early" if model.convolution.gate_at == "before_norm" else "se"
    yield from pointwise(f"{theirs}.conv.shortcut.expand", f"{ours}.conv.shortcut")
    yield from batch_norm(f"{theirs}.conv.pre_norm", f"{ours}.conv.pre_norm")
    yield from pointwise(f"{theirs}.conv.conv1_1x1", f"{ours}.conv.conv1")
    yield from batch_norm(f"{theirs}.conv.norm1", f"{ours}.conv.norm1")
    yield from conv(f"{theirs}.conv.conv2_kxk", f"{ours}.conv.conv2")
    yield from batch_norm(f"{theirs}.conv.norm2", f"{ours}.conv.norm2")
    for fc in ("fc1", "fc2"):
        yield from conv(f"{theirs}.conv.{gate}.{fc}", f"{ours}.conv.se.{fc}")
    yield from pointwise(f"{theirs}.conv.conv3_1x1", f"{ours}.conv.conv3")
    for half in _HALVES:
        for name in ("norm1", "norm2"):
            yield from norm(f"{theirs}.{half}.{name}", f"{ours}.{half}.{name}")
        for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            yield from linear(f"{theirs}.{half}.{name}", f"{ours}.{half}.{name}")
        table = "attn.rel_pos.relative_position_bias_table"
        yield from copy(f"{theirs}.{half}.{table}", f"{ours}.{half}.attn.relative_bias")
        for name in ("ls1", "ls2"):
            yield from copy(f"{theirs}.{half}.{name}.gamma", f"{ours}.{half}.{name}.gamma")


# --- TensorFlow -------------------------------------------------------------------------------------------------------


def tensorflow_table(model: MaxViT) -> Table:
    """Names and layouts of google-research/maxvit, without the model's own name before them."""
    return Table(
        _renamed("stem/conv_0", "patch_embed.conv1", "kernel"),
        _tf_batch_norm("stem/norm_0", "patch_embed.norm1"),
        _renamed("stem/conv_1", "patch_embed.conv2", "kernel"),
        *(_tf_layer(f"block_{stage:02d}_{block:02d}", ours, model) for stage, block, ours in _layers(model)),
        _tf_norm("final_layer_norm", "norm"),
        _renamed("cls_head/inner_dense", "pre_logits", "weight"),
        _renamed("cls_head/logit_dense", "head", "weight"),
    )


def _tf_layer(theirs: str, ours: str, model: MaxViT) -> Iterator[Row]:
    conv_theirs, conv_ours = f"{theirs}/mbconv", f"{ours}.conv"
    for their_name, our_name in (("expand_conv", "conv1"), ("shrink_conv", "conv3"), ("shortcut_conv", "shortcut")):
        # Kernels `[1, 1, in, out]`.
        yield from custom(
            f"{conv_theirs}/{their_name}/kernel",
            f"{conv_ours}.{our_name}.kernel",
            lambda arrays, sizes: [arrays[0].reshape(arrays[0].shape[-2:])],
            lambda arrays: [arrays[0][None, None]],
        )
        yield from copy(f"{conv_theirs}/{their_name}/bias", f"{conv_ours}.{our_name}.bias")
    yield from custom(
        f"{conv_theirs}/depthwise_conv/depthwise_kernel",
        f"{conv_ours}.conv2.kernel",
        lambda arrays, sizes: [np.swapaxes(arrays[0], -1, -2)],
        lambda arrays: [np.swapaxes(arrays[0], -1, -2)],
    )
    for their_name, our_name in (("pre_norm", "pre_norm"), ("expand_norm", "norm1"), ("depthwise_norm", "norm2")):
        yield from _tf_batch_norm(f"{conv_theirs}/{their_name}", f"{conv_ours}.{our_name}")
    for their_name, our_name in (("reduce_conv2d", "fc1"), ("expand_conv2d", "fc2")):
        yield from _renamed(f"{conv_theirs}/se/{their_name}", f"{conv_ours}.se.{our_name}", "kernel")
    for suffix, half in zip(("", "_1"), _HALVES, strict=True):
        yield from _tf_norm(f"{theirs}/attn_layer_norm{suffix}", f"{ours}.{half}.norm1")
        yield from _tf_attention(f"{theirs}/attention{suffix}", f"{ours}.{half}.attn", model.options.head_width)
        yield from _tf_norm(f"{theirs}/ffn_layer_norm{suffix}", f"{ours}.{half}.norm2")
        for their_name, our_name in (("expand_dense", "fc1"), ("shrink_dense", "fc2")):
            yield from _renamed(f"{theirs}/ffn{suffix}/{their_name}", f"{ours}.{half}.mlp.{our_name}", "weight")


def _tf_attention(theirs: str, ours: str, head_width: int) -> Iterator[Row]:
    """Queries, keys and values are three projections `[C, heads, d]` with biases `[heads, d]`; theirs has heads first
    in the output projection, `[heads, d, C]`.
    """
    parts = ("q", "k", "v")
    for their_leaf, our_leaf in zip(_LEAVES, ("kernel", "bias"), strict=True):
        yield from custom(
            [f"{theirs}/{part}/{their_leaf}" for part in parts],
            f"{ours}.qkv.{our_leaf}",
            lambda arrays, sizes: [np.concatenate([a.reshape(*a.shape[:-2], -1) for a in arrays], axis=-1)],
            lambda arrays: [part.reshape(*part.shape[:-1], -1, head_width) for part in np.split(arrays[0], 3, axis=-1)],
        )
    yield from custom(
        f"{theirs}/o/weight",
        f"{ours}.proj.kernel",
        lambda arrays, sizes: [arrays[0].reshape(-1, arrays[0].shape[-1])],
        lambda arrays: [arrays[0].reshape(-1, head_width, arrays[0].shape[-1])],
    )
    yield from copy(f"{theirs}/o/bias", f"{ours}.proj.bias")
    yield from copy(f"{theirs}/relative_bias", f"{ours}.relative_bias")


def _renamed(theirs: str, ours: str, kernel: str) -> Iterator[Row]:
    """A layer in the same layout, whose kernel has another name."""
    yield from copy(f"{theirs}/{kernel}", f"{ours}.kernel")
    yield from copy(f"{theirs}/bias", f"{ours}.bias")


def _tf_norm(theirs: str, ours: str) -> Iterator[Row]:
    yield from copy(f"{theirs}/gamma", f"{ours}.scale")
    yield from copy(f"{theirs}/beta", f"{ours}.bias")


def _tf_batch_norm(theirs: str, ours: str) -> Iterator[Row]:
    yield from _tf_norm(theirs, ours)
    yield from copy(f"{theirs}/moving_mean", f"{ours}.mean")
    yield from copy(f"{theirs}/moving_variance", f"{ours}.var")


_VARIABLE = re.compile(
    r"(?:.*/)?((?:stem|block_\d\d_\d\d|final_layer_norm|cls_head)/"
    r"(?:.*/)?(?:kernel|depthwise_kernel|weight|bias|relative_bias|gamma|beta|moving_mean|moving_variance))"
    rf"({AVERAGE})?(?::0)?"
)
_FIRST = re.compile(rf"(?:.*/)?stem/conv_0/kernel(?:{AVERAGE})?(?::0)?")


def _checkpoint(arrays: Flat, model: MaxViT) -> tuple[Flat, list[str]]:
    """The model's variables by the table's names: averages where there are any, as the official evaluation takes;
    optimizer slots and counters are not the model's.
    """
    own: Flat = {}
    averages: Flat = {}
    for name, array in arrays.items():
        if match := _VARIABLE.fullmatch(name):
            (averages if match[2] else own)[match[1]] = array
    notes = []
    if averages:
        notes.append(f"moving averages are taken for {len(averages)} of {len(own | averages)} arrays")
    if left := len(arrays) - len(own) - len(averages):
        notes.append(f"{left} entries that are no variables of the model are left out")
    return own | averages, notes


TENSORFLOW = Dialect(
    "google-research/maxvit",
    lambda names: any(_FIRST.fullmatch(name) for name in names),
    _checkpoint,
    layout="tensorflow",
)
