"""What `benchmarks/neighborhood_tpu.py` compiles: neighborhood attention by this project and by everything else.

Every side takes packed projections `[B, *map, H * D]` as a linear layer gives them, and returns a packed output; where
it is given the cotangent of that, the three packed gradients beside it. So each pays for the layout that it wants.
Queries come scaled to those that expect it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels.neighborhood.pattern import Pattern, make_pattern

Packed = Float[Array, "B *S HD"]
Attention = Callable[[Array, Array, Array], Array]


def _run(attention: Attention, q: Packed, k: Packed, v: Packed, cotangents: Sequence[Packed]) -> tuple[Array, ...]:
    """The output, and where there is a cotangent the gradients."""
    if not cotangents:
        return (attention(q, k, v),)
    out, backward = jax.vjp(attention, q, k, v)
    return (out, *backward(cotangents[0]))


def ours(
    q: Packed,
    k: Packed,
    v: Packed,
    *cotangents: Packed,
    heads: int,
    window: int | Sequence[int],
    dilation: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    tile: Sequence[int] | None = None,
    residues: int = 1,
) -> tuple:
    """`attn.neighborhood_attention` by what it chooses on a TPU.

    Args:
      tile, residues: by the kernels, with these instead of their own choice of tiles.
    """
    import attn
    from kernels.neighborhood import tpu_choice, tuning

    settings: Any = {"window": window, "dilation": dilation, "stride": stride}
    settings["implementation"] = None if tile is None else "tpu"

    def attention(q: Array, k: Array, v: Array) -> Array:
        q, k, v = (x.reshape(*x.shape[:-1], heads, -1) for x in (q, k, v))
        out = attn.neighborhood_attention(q, k, v, **settings)
        return out.reshape(*out.shape[:-2], -1)

    if tile is None:
        return _run(attention, q, k, v, cotangents)
    only = [(tuple(tile), residues)]
    with (
        mock.patch.object(tpu_choice, "candidates", return_value=only),
        mock.patch.object(tuning, "lookup", return_value=None),
    ):
        return _run(attention, q, k, v, cotangents)


def dense(
    q: Packed, k: Packed, v: Packed, *cotangents: Packed, heads: int, window: int, dilation: int, heads_first: bool
) -> tuple:
    """Softmax attention by XLA over all pairs, the pattern as a mask where it is not dense.

    Args:
      heads_first: whether q, k and v are brought to `[B, H, N, D]` before, or the products take `[B, N, H, D]`.
    """
    pattern = make_pattern(q.shape[1:-1], window, dilation=dilation)

    def attention(q: Array, k: Array, v: Array) -> Array:
        q, k, v = (x.reshape(x.shape[0], pattern.tokens, heads, -1) for x in (q, k, v))
        axes = "bqhd,bkhd,bqhd"
        if heads_first:
            q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
            axes = "bhqd,bhkd,bhqd"
        queries, keys, result = axes.split(",")
        logits = jnp.einsum(f"{queries},{keys}->bhqk", q, k, preferred_element_type=jnp.float32)
        if not pattern.is_dense:
            logits = jnp.where(pattern.mask(), logits, -jnp.inf)
        out = jnp.einsum(f"bhqk,{keys}->{result}", jax.nn.softmax(logits).astype(v.dtype), v)
        out = out.transpose(0, 2, 1, 3) if heads_first else out
        return out.reshape(out.shape[0], *pattern.shape, -1)

    return _run(attention, q, k, v, cotangents)


def splash(
    q: Packed,
    k: Packed,
    v: Packed,
    *cotangents: Packed,
    heads: int,
    window: int,
    dilation: int,
    block_q: int,
    block_kv: int,
    order: str = "tokens",
    fused: bool = False,
) -> tuple:
    """Splash attention with the pattern as its mask.

    Args:
      order: `"tokens"` as they are, or `"groups"`: sorted by group of the dilation first, which leaves the mask few
        blocks that are not empty.
      fused: one backward kernel rather than two.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    pattern = make_pattern(q.shape[1:-1], window, dilation=dilation)
    mask = pattern.mask() if order == "tokens" else _grouped_mask(pattern)
    # Lengths have to be multiples of the blocks. Padding queries see the first token, nobody sees padding.
    missing = -pattern.tokens % math.lcm(block_q, block_kv)
    mask = np.pad(mask, ((0, missing), (0, missing)))
    mask[pattern.tokens :, 0] = True
    backward: dict = {}
    if cotangents:
        backward = {"block_q_dkv": block_q, "block_kv_dkv": block_kv, "use_fused_bwd_kernel": fused}
        backward |= {} if fused else {"block_q_dq": block_q, "block_kv_dq": block_kv}
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([masks.NumpyMask(mask)] * heads),
        block_sizes=kernels.BlockSizes(block_q=block_q, block_kv=block_kv, **backward),
        head_shards=1,
        q_seq_shards=1,
    )

    def attention(q: Array, k: Array, v: Array) -> Array:
        if order == "groups":
            q, k, v = (_into_groups(x, dilation) for x in (q, k, v))
        shape = q.shape[1:-1]
        q, k, v = (_heads_first(x, heads) for x in (q, k, v))
        if missing:
            q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0))) for x in (q, k, v))
        # Without barriers XLA makes dear concatenations of some of these transpositions (1-D: four times the cycles).
        q, k, v = jax.lax.optimization_barrier((q, k, v))
        out = jax.lax.optimization_barrier(jax.vmap(kernel)(q, k, v))
        out = _packed(out[:, :, : pattern.tokens], shape)
        return _out_of_groups(out, dilation) if order == "groups" else out

    return _run(attention, q, k, v, cotangents)


def _heads_first(x: Packed, heads: int) -> Float[Array, "B H N D"]:
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), heads, -1).transpose(0, 2, 1, 3)


def _packed(x: Float[Array, "B H N D"], shape: Sequence[int]) -> Packed:
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], *shape, -1)


def _into_groups(x: Any, dilation: int) -> Any:
    """Axes `[L0, L1, C]` to `[dilation, dilation, L0 / dilation, L1 / dilation, C]`."""
    batch, *shape, width = x.shape
    rank = len(shape)
    split = x.reshape(batch, *(size for length in shape for size in (length // dilation, dilation)), width)
    members, groups = range(1, 2 * rank, 2), range(2, 2 * rank + 1, 2)
    return split.transpose(0, *groups, *members, 2 * rank + 1)


def _out_of_groups(x: Array, dilation: int) -> Packed:
    batch, *shape, width = x.shape
    rank = len(shape) // 2
    order = [axis for one in range(rank) for axis in (1 + rank + one, 1 + one)]
    lengths = [dilation * length for length in shape[rank:]]
    return x.transpose(0, *order, 2 * rank + 1).reshape(batch, *lengths, width)


@functools.cache
def _grouped_mask(pattern: Pattern) -> np.ndarray:
    dilation = pattern.axes[0].dilation
    tokens = np.arange(pattern.tokens).reshape(1, *pattern.shape, 1)
    order = np.asarray(_into_groups(tokens, dilation)).ravel()
    return pattern.mask()[np.ix_(order, order)]
