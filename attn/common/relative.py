"""Bias by relative position: tables over displacements `key - query`, `[H, 2n - 1, ...]` for sides n."""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attn.common.positions import resample_positions


def relative_position_bias(table: Float[Array, "H *R"], shape: Sequence[int]) -> Float[Array, "H N N"]:
    """The bias of every pair of places of a grid of `shape` in row-major order, to be added to `[B, H, N, N]` logits.

    `bias[h, i, j]` is `table[h, j - i + n - 1]` for places i and j, along each axis of n places.

    Raises:
      ValueError: the table is for another grid.
    """
    extents = tuple(2 * n - 1 for n in shape)
    if table.shape[1:] != extents:
        raise ValueError(f"relative position bias: a grid of {tuple(shape)} needs a table of {extents}")
    # Row i of an axis is a contiguous piece of the table: one gather per axis, of pieces and not of numbers.
    bias = table
    for axis, n in enumerate(shape):
        displacement = np.arange(n) - np.arange(n)[:, None] + n - 1
        bias = jnp.take(bias, displacement, axis=1 + 2 * axis)
    rank = len(shape)
    order = itertools.chain((0,), range(1, 2 * rank, 2), range(2, 2 * rank + 1, 2))
    return bias.transpose(*order).reshape(table.shape[0], *[int(np.prod(shape))] * 2)


def resample_relative_bias(
    table: Float[Array | np.ndarray, "H Y X"], extents: Sequence[int], *, method: str = "cubic"
) -> Float[Array | np.ndarray, "H V U"]:
    """A table over displacements of two axes for another window or grid.

    Swin's and DiNAT's practice (arXiv:2209.15001): displacement d of the old window lies where
    `d * new / old` of the new one does, whatever the dilation.

    Args:
      method: see `attn.common.positions.resample_positions`.
    """
    heads, *old = table.shape
    flat = table.reshape(heads, -1).T[None]
    flat = resample_positions(flat, (old[0], old[1]), (extents[0], extents[1]), method=method)
    return flat[0].T.reshape(heads, *extents)
