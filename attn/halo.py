"""Blocked local attention with a halo: the queries of a block share the keys of the block and of a border around it.

HaloNet (arXiv:2103.12731). The paper has no official code; conventions are those of timm's `HaloAttn`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from attn.common.relative_logits import relative_logits
from attn.common.windows import from_windows, to_windows
from attn.dense.api import Hook, dense_attention


def halo_attention(
    q: Float[Array, "B V U H D"],
    k: Float[Array, "B Y X H D"],
    v: Float[Array, "B Y X H E"],
    *,
    block: int,
    halo: int,
    stride: int = 1,
    height_rel: Float[Array, "R D"] | None = None,
    width_rel: Float[Array, "R D"] | None = None,
    scale: float | None = None,
    scale_positions: bool = False,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    hook: Hook | None = None,
    layer: Any = None,
) -> Float[Array, "B V U H E"]:
    """Softmax attention of the queries of every block to the keys of its window.

    The map of keys is cut into blocks of `block x block` places. A block's window has `block + 2 * halo` places a side;
    what lies outside the map is a key and a value of zeros, which is seen like any other: nothing is masked.

    Args:
      q: with `stride` 2, every second row and column of the map: `Y / stride` rows.
      halo: places on each side of a block, any number.
      height_rel, width_rel: embeddings of relative positions, `2 * (block + 2 * halo) - 1` rows each, dotted with the
        queries and shared by heads (see `relative_logits`). Row `u - i + window - 1` is for row u of the window and row
        i of the block's queries, both counted from 0, so halo and stride are not in the difference. None for none.
      scale: of the products `q k^T`; `D ** -0.5` unless given.
      scale_positions: relative logits are scaled too.
      dropout, key, hook, layer: as in `dense_attention`; the hook sees blocks as a batch: `"q"`
        `[B * blocks, N, H, D]`, `"probs"` `[B * blocks, H, N, window ** 2]`.

    Raises:
      ValueError: blocks that do not divide the map, a stride that does not divide the block or that `q` does not have,
        one table without the other, or tables of other sizes.
    """
    shape = k.shape[1:3]
    if any(side % block for side in shape):
        raise ValueError(f"block={block}: does not divide a map of {shape}")
    if block % stride:
        raise ValueError(f"stride={stride}: does not divide a block of {block}")
    if q.shape[1:3] != tuple(side // stride for side in shape):
        raise ValueError(f"queries on a map of {q.shape[1:3]} with stride {stride} do not fit keys on one of {shape}")
    if (height_rel is None) != (width_rel is None):
        raise ValueError("halo attention: give height_rel and width_rel, or neither")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    sides, window = (block // stride,) * 2, (block + 2 * halo,) * 2
    queries = _cut(q, lambda x: to_windows(x, sides))
    bias = None
    if height_rel is not None and width_rel is not None:
        bias = relative_logits(queries.reshape(-1, *sides, *q.shape[3:]), height_rel, width_rel, window)
        bias = bias * scale if scale_positions else bias
    heads = dense_attention(
        queries,
        _cut(k, lambda x: haloed_windows(x, block, halo)),
        _cut(v, lambda x: haloed_windows(x, block, halo)),
        bias=bias,
        scale=scale,
        dropout=dropout,
        key=key,
        hook=hook,
        layer=layer,
    )
    out = from_windows(heads.reshape(*heads.shape[:2], -1), q.shape[1:3], sides)
    return out.reshape(*out.shape[:3], *heads.shape[2:])


def _cut(x: Float[Array, "B Y X H D"], cut: Callable[[Array], Array]) -> Float[Array, "G N H D"]:
    """Cut with features in one axis: a TPU stores the last two in tiles, and heads would fill a part of each."""
    windows = cut(x.reshape(*x.shape[:3], -1))
    return windows.reshape(*windows.shape[:2], *x.shape[3:])


def haloed_windows(x: Float[Array, "B Y X *F"], block: int, halo: int) -> Float[Array, "G M *F"]:
    """The windows around the blocks of all examples one after the other, places of each in row-major order.

    `G` is B times the number of blocks and `M = (block + 2 * halo) ** 2`; places outside the map are zeros.
    """
    x = _haloed(_haloed(x, 1, block, halo), 3, block, halo)
    x = jnp.moveaxis(x, 3, 2)
    return x.reshape(-1, x.shape[3] * x.shape[4], *x.shape[5:])


def _haloed(x: Array, axis: int, block: int, halo: int) -> Array:
    """An axis as two: its blocks, and the places of the window around each.

    A window is pieces of a few neighbouring blocks of the padded axis: slices and one concatenation, whose gradient is
    slices and sums, where a gather's would be a scatter.
    """
    blocks, window = x.shape[axis] // block, block + 2 * halo
    pieces = -(-window // block)
    behind = (blocks - 1 + pieces) * block - x.shape[axis] - halo
    x = jnp.pad(x, [(halo, behind) if number == axis else (0, 0) for number in range(x.ndim)])
    x = x.reshape(*x.shape[:axis], blocks - 1 + pieces, block, *x.shape[axis + 1 :])
    return jnp.concatenate(
        [
            jax.lax.slice_in_dim(
                jax.lax.slice_in_dim(x, piece, piece + blocks, axis=axis),
                0,
                min(block, window - piece * block),
                axis=axis + 1,
            )
            for piece in range(pieces)
        ],
        axis=axis + 1,
    )
