"""Weight names of the ViT family: timm's (also DeiT's and, through dialects, others'), and big_vision's.

big_vision's layouts are ours, apart from attention, where queries, keys and values are three arrays with an axis of
heads. https://github.com/google-research/big_vision, models/hosts/isotropic.py.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from models.hosts.isotropic import VisionTransformer
from models.weights.table import Arrays, Row, Table, copy, custom, linear, norm
from models.weights.table import conv as convolution

# --- timm -------------------------------------------------------------------------------------------------------------


def torch_table(model: VisionTransformer) -> Table:
    """timm's names for this model. The kinds of blocks have rows of their own, since they share names of ours."""
    blocks: dict[str, Callable[[], Iterator[Row]]] = {
        "pre_norm": _plain_block,
        "post_norm": _plain_block,
        "parallel": partial(_parallel_block, fused_bias=model.options.qkv_bias),
        "two_branch": _two_branch_block,
    }
    return Table(
        *(copy(name) for name in ("cls_token", "dist_token", "reg_token", "pos_embed")),
        convolution("patch_embed.proj", "patch_embed"),
        norm("norm_pre"),
        blocks[model.options.block](),
        norm("norm"),
        norm("fc_norm"),
        attention_pool_rows("attn_pool."),
        linear("pre_logits.fc", "pre_logits"),
        linear("head"),
        linear("head_dist"),
    )


def attention_pool_rows(prefix: str) -> Iterator[Row]:
    """Rows of an attention pooling."""
    yield from copy(f"{prefix}latent")
    for name in ("q", "kv", "proj", "mlp.fc1", "mlp.fc2"):
        yield from linear(prefix + name)
    yield from norm(f"{prefix}norm")


def _attention(theirs: str, ours: str) -> Iterator[Row]:
    for name in ("qkv", "proj"):
        yield from linear(f"{theirs}.{name}", f"{ours}.{name}")
    for name in ("q_norm", "k_norm", "norm", "sub_norm"):
        yield from norm(f"{theirs}.{name}", f"{ours}.{name}")
    for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
        yield from copy(f"{theirs}.{name}", f"{ours}.{name}")


def _mlp(theirs: str, ours: str) -> Iterator[Row]:
    for name in ("fc1", "fc2"):
        yield from linear(f"{theirs}.{name}", f"{ours}.{name}")
    yield from norm(f"{theirs}.norm", f"{ours}.norm")


def _plain_block() -> Iterator[Row]:
    yield from _attention("blocks.{}.attn", "blocks.{}.attn")
    yield from _mlp("blocks.{}.mlp", "blocks.{}.mlp")
    for number in (1, 2):
        yield from norm(f"blocks.{{}}.norm{number}")
        yield from copy(f"blocks.{{}}.ls{number}.gamma")


def _parallel_block(fused_bias: bool) -> Iterator[Row]:
    """One input projection for MLP and attention; without a bias in it, the MLP has one of its own."""
    weight, bias = linear("blocks.{}.in_proj", ("blocks.{}.mlp.fc1", "blocks.{}.attn.qkv"))
    yield weight
    yield from [bias] if fused_bias else copy("blocks.{}.mlp_bias", "blocks.{}.mlp.fc1.bias")
    yield from norm("blocks.{}.in_norm", "blocks.{}.norm")
    for name in ("q_norm", "k_norm"):
        yield from norm(f"blocks.{{}}.{name}", f"blocks.{{}}.attn.{name}")
    yield from linear("blocks.{}.attn_out_proj", "blocks.{}.attn.proj")
    yield from linear("blocks.{}.mlp_out_proj", "blocks.{}.mlp.fc2")
    yield from copy("blocks.{}.ls.gamma")


def _two_branch_block() -> Iterator[Row]:
    for theirs, module, ours, rows in (("attns", "attn", "attn", _attention), ("ffns", "mlp", "mlp", _mlp)):
        for branch in (0, 1):
            there, here = f"blocks.{{}}.{theirs}.{branch}", f"blocks.{{}}.{ours}{branch + 1}"
            yield from norm(f"{there}.norm", f"{here}_norm")
            yield from rows(f"{there}.{module}", here)
            yield from copy(f"{there}.ls.gamma", f"{here}_ls.gamma")


# --- big_vision -------------------------------------------------------------------------------------------------------


def big_vision_table(model: VisionTransformer) -> Table:
    """Names of big_vision's ViT for this model, without a prefix and with one entry per layer.

    ValueError for a kind of block that big_vision does not have.
    """
    if model.options.block != "pre_norm":
        raise ValueError(f"big_vision has no blocks of kind {model.options.block!r}")
    block, pool = "Transformer/encoderblock_{}", "MAPHead_0"
    return Table(
        _flax("embedding", "patch_embed"),
        copy("cls", "cls_token"),
        copy("pos_embedding", "pos_embed"),
        *(_flax(f"{block}/LayerNorm_{i}", f"blocks.{{}}.norm{i + 1}", ("scale", "bias")) for i in (0, 1)),
        _heads(f"{block}/MultiHeadDotProductAttention_0", "blocks.{}.attn", ("qkv",), model.options.heads),
        *(_flax(f"{block}/MlpBlock_0/Dense_{i}", f"blocks.{{}}.mlp.fc{i + 1}") for i in (0, 1)),
        _flax("Transformer/encoder_norm", "norm", ("scale", "bias")),
        copy(f"{pool}/probe", "attn_pool.latent"),
        _heads(f"{pool}/MultiHeadDotProductAttention_0", "attn_pool", ("q", "kv"), model.options.heads),
        _flax(f"{pool}/LayerNorm_0", "attn_pool.norm", ("scale", "bias")),
        *(_flax(f"{pool}/MlpBlock_0/Dense_{i}", f"attn_pool.mlp.fc{i + 1}") for i in (0, 1)),
        _flax("pre_logits", "pre_logits"),
        _flax("head", "head"),
    )


def _flax(theirs: str, ours: str, leaves: Sequence[str] = ("kernel", "bias")) -> Iterator[Row]:
    for leaf in leaves:
        yield from copy(f"{theirs}/{leaf}", f"{ours}.{leaf}")


def _heads(theirs: str, ours: str, fused: Sequence[str], heads: int) -> Iterator[Row]:
    """Flax's attention `[C, H, D]` per projection, fused here as `fused` says ("qkv", or "q" and "kv")."""
    names = {"q": "query", "k": "key", "v": "value"}

    def merge(array: np.ndarray, axis: int) -> np.ndarray:
        if array.ndim < -axis or array.shape[axis] != heads:
            raise ValueError(f"shape {array.shape} is not one of {heads} heads")
        before, after = array.shape[:axis], array.shape[axis:][2:]
        return array.reshape(*before, -1, *after)

    def separate(array: np.ndarray, axis: int) -> np.ndarray:
        return array.reshape(*array.shape[:axis], heads, -1, *array.shape[axis:][1:])

    for module in fused:

        def joined(arrays: Arrays, sizes: Sequence[int]) -> Arrays:
            return [np.concatenate([merge(array, -2) for array in arrays], axis=-1)]

        def split(arrays: Arrays, parts: int = len(module)) -> Arrays:
            return [separate(part, -1) for part in np.split(arrays[0], parts, axis=-1)]

        for leaf in ("kernel", "bias"):
            yield from custom([f"{theirs}/{names[x]}/{leaf}" for x in module], f"{ours}.{module}.{leaf}", joined, split)
    yield from custom(
        f"{theirs}/out/kernel",
        f"{ours}.proj.kernel",
        lambda arrays, sizes: [merge(arrays[0], -3)],
        lambda arrays: [separate(arrays[0], -2)],
    )
    yield from copy(f"{theirs}/out/bias", f"{ours}.proj.bias")
