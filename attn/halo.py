"""Blocked local attention with a halo: the queries of a block share the keys of the block and of a border around it.

HaloNet (arXiv:2103.12731). The paper has no official code; conventions are those of timm's `HaloAttn`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from attn.common.maps import check_lse, check_numbers
from attn.common.relative_logits import relative_logits
from attn.common.windows import from_windows, to_windows
from attn.core.arguments import check_counts, check_maps, usable_scale
from attn.core.numerics import Edit, edited
from attn.dense.api import dense_attention, dense_maps


def halo_attention(
    q: Float[Array, "B V U H D"],
    k: Float[Array, "B Y X K D"],
    v: Float[Array, "B Y X K E"],
    *,
    block_size: int,
    halo_size: int,
    stride: int = 1,
    height_rel: Float[Array, "R D"] | None = None,
    width_rel: Float[Array, "R D"] | None = None,
    scale: float | None = None,
    scale_positions: bool = False,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    edit: Edit | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Softmax attention of the queries of every block to the keys of its window.

    The map of keys is cut into blocks of `block_size x block_size` places. A block's window has `block_size + 2 *
    halo_size` places a side; what lies outside the map is a key and a value of zeros, which is seen like any other:
    nothing is masked.

    Args:
      q: with `stride` 2, every second row and column of the map: `Y / stride` rows.
      halo_size: places on each side of a block, any number.
      height_rel, width_rel: embeddings of relative positions, `2 * (block_size + 2 * halo_size) - 1` rows each, dotted
        with the queries and shared by heads (see `relative_logits`). Row `u - i + window - 1` is for row u of the
        window and row i of the block's queries, both counted from 0, so halo and stride are not in the difference. None
        for none.
      scale: of the products `q k^T`; `D ** -0.5` unless given.
      scale_positions: relative logits are scaled too.
      dropout, key, implementation: as in `dense_attention`.
      edit: may change `"logits"` and `"probs"` `[B, blocks, H, N, window ** 2]`, float32.
      return_lse: return `(out, lse)` with the logsumexp `[B, V, U, H]`, float32, natural.

    Raises:
      ValueError: arrays that do not belong together; blocks that do not divide the map, a stride that does not divide
        the block or that `q` does not have, one table without the other, or tables of other sizes.
    """
    scale = _check(q, k, v, block_size, halo_size, stride, height_rel, width_rel, scale)
    sides = (block_size // stride,) * 2
    queries = _cut(q, lambda x: to_windows(x, sides))
    bias = _bias(queries, height_rel, width_rel, sides, block_size + 2 * halo_size, scale if scale_positions else None)
    batch = q.shape[0]

    def seen(site: str, value: Array) -> Array:
        return edited(edit, site, value.reshape(batch, -1, *value.shape[1:])).reshape(value.shape)

    found = dense_attention(
        queries,
        _cut(k, lambda x: haloed_windows(x, block_size, halo_size)),
        _cut(v, lambda x: haloed_windows(x, block_size, halo_size)),
        bias=bias,
        scale=scale,
        dropout=dropout,
        key=key,
        edit=None if edit is None else seen,
        return_lse=return_lse,
        implementation=implementation,
    )
    heads, *lse = found if return_lse else (found,)
    out = from_windows(heads.reshape(*heads.shape[:2], math.prod(heads.shape[2:])), q.shape[1:3], sides)
    out = out.reshape(*out.shape[:3], *heads.shape[2:])
    return (out, *(from_windows(x, q.shape[1:3], sides) for x in lse)) if return_lse else out


def halo_maps(
    q: Float[Array, "B V U H D"],
    k: Float[Array, "B Y X K D"],
    lse: Float[Array, "B V U H"],
    blocks: Sequence[int] | Int[Array, " W"],
    *,
    block_size: int,
    halo_size: int,
    stride: int = 1,
    height_rel: Float[Array, "R D"] | None = None,
    width_rel: Float[Array, "R D"] | None = None,
    scale: float | None = None,
    scale_positions: bool = False,
) -> Float[Array, "B W H N M"]:
    """What the queries of chosen blocks look at, `exp(logit - lse)` in float32, from a run that keeps no map.

    Args:
      lse: what `halo_attention(..., return_lse=True)` gave for q and k; the other arguments are those of that call.
      blocks: numbers of blocks in row-major order.

    Raises:
      ValueError: as `halo_attention`; a logsumexp of other queries; a block that there is not.
    """
    scale = _check(q, k, k, block_size, halo_size, stride, height_rel, width_rel, scale)
    check_lse(lse, q.shape[:-1])
    sides = (block_size // stride,) * 2
    count = (k.shape[1] // block_size) * (k.shape[2] // block_size)
    numbers = check_numbers("block", blocks, count)

    def chosen(windows: Array) -> Array:
        """Of windows of all examples."""
        windows = windows.reshape(q.shape[0], count, *windows.shape[1:])[:, numbers]
        return windows.reshape(-1, *windows.shape[2:])

    queries = chosen(_cut(q, lambda x: to_windows(x, sides)))
    bias = _bias(queries, height_rel, width_rel, sides, block_size + 2 * halo_size, scale if scale_positions else None)
    keys = chosen(_cut(k, lambda x: haloed_windows(x, block_size, halo_size)))
    maps = dense_maps(queries, keys, chosen(to_windows(lse, sides)), bias=bias, scale=scale)
    return maps.reshape(q.shape[0], len(numbers), *maps.shape[1:])


def _check(
    q: Any, k: Any, v: Any, block_size: int, halo_size: int, stride: int, height_rel: Any, width_rel: Any, scale: Any
) -> float:
    """The scale; ValueError for what does not belong together."""
    check_counts(1, block_size=block_size, stride=stride)
    check_counts(0, halo_size=halo_size)
    check_maps(q, k, v)
    shape = k.shape[1:3]
    if any(side % block_size for side in shape):
        raise ValueError(f"block_size={block_size}: does not divide a map of {tuple(shape)}")
    if block_size % stride:
        raise ValueError(f"stride={stride}: does not divide a block of {block_size}")
    if q.shape[1:3] != tuple(side // stride for side in shape):
        theirs, ours = tuple(shape), tuple(q.shape[1:3])
        raise ValueError(f"queries on a map of {ours} with stride {stride} do not fit keys on one of {theirs}")
    if (height_rel is None) != (width_rel is None):
        raise ValueError("halo attention: give height_rel and width_rel, or neither")
    return usable_scale(scale, q.shape[-1])


def _bias(
    queries: Float[Array, "G N H D"],
    height_rel: Any,
    width_rel: Any,
    sides: tuple[int, int],
    window: int,
    scale: float | None,
) -> Float[Array, "G H N M"] | None:
    """Logits by relative position; None without tables."""
    if height_rel is None or width_rel is None:
        return None
    queries = queries.reshape(queries.shape[0], *sides, *queries.shape[2:])
    logits = relative_logits(queries, height_rel, width_rel, (window, window))
    return logits if scale is None else logits * scale


def _cut(x: Float[Array, "B Y X H D"], cut: Callable[[Array], Array]) -> Float[Array, "G N H D"]:
    """Cut with features in one axis: a TPU stores the last two in tiles, and heads would fill a part of each."""
    windows = cut(x.reshape(*x.shape[:3], math.prod(x.shape[3:])))
    return windows.reshape(*windows.shape[:2], *x.shape[3:])


def haloed_windows(x: Shaped[Array, "B Y X *F"], block: int, halo: int) -> Shaped[Array, "G M *F"]:
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
