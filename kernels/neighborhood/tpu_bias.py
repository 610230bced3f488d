"""Relative position bias for the TPU kernels: from a table to what a tile adds to its logits, and back.

The bias of a tile depends on where its box begins relative to its queries, and on nothing else. Along z and y boxes are
windows into one larger box, so it is spread out once for that one; along x there is one copy for each offset that
occurs. Spreading out is a product with matrices of zeros and ones for each axis, so its gradient is one too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels.neighborhood.tiles import AxisTiles
from kernels.neighborhood.tpu_plan import Plan, offsets


def spread_bias(plan: Plan, table: Float[Array, " H *W"]) -> Float[Array, "H O Z Y K Q"]:
    """What each tile adds to its logits.

    Returns:
      By head, offset along x, position in the larger box along z and y, key along x, query of the tile. Pairs whose
      distance is not in the table get zero: they are masked.
    """
    table = table.reshape(table.shape[0], *(1,) * (4 - table.ndim), *table.shape[1:])
    z, y, x = (_one_hot(axis) for axis in plan.tiles.axes)
    product = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    out = jnp.einsum("hzyx,xokq->hzyokq", table.astype(jnp.float32), _along_x(plan.tiles.axes[2], x), **product)
    out = jnp.einsum("hzyokq,yar->hzaokrq", out, y, **product)
    out = jnp.einsum("hzaokrq,zbs->hobaksrq", out, z, **product)
    return out.reshape(*out.shape[:5], plan.tiles.queries)


def _one_hot(axis: AxisTiles) -> np.ndarray:
    """`[entry of the table, offset + position in the box, query]`; for x positions are those of one box."""
    found = offsets(axis)
    first = found if axis.multiple > 1 else found[:1]
    last = axis.span if axis.multiple > 1 else axis.span + len(found) - 1
    distance = first[:, None, None] + np.arange(last)[:, None] - np.arange(axis.tile)
    entries = np.arange(2 * axis.axis.window - 1)
    hot = entries[:, None, None, None] == distance + axis.axis.window - 1
    return (hot if axis.multiple > 1 else hot[:, 0]).astype(np.float32)


def _along_x(axis: AxisTiles, hot: np.ndarray) -> np.ndarray:
    """The same for tiles of several groups, of which each sees its own keys only: `[entry, offset, key, query]`."""
    entries, count, keys, queries = hot.shape
    own = np.eye(axis.residues, dtype=np.float32)
    both = np.einsum("eokq,rs->eorksq", hot, own)
    return both.reshape(entries, count, axis.residues * keys, axis.residues * queries)
