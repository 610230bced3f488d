"""Logits by relative position that depend on the query, one table for rows and one for columns; attention with them.

Such embeddings are those of Attention Augmented Convolutional Networks (arXiv:1904.09925), BoTNet
(arXiv:2101.11605) and HaloNet (arXiv:2103.12731). All heads share a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attn.core.numerics import product


def relative_logits(
    q: Float[Array, "B I J H D"],
    height_rel: Float[Array, "R D"],
    width_rel: Float[Array, "S D"],
    shape: Sequence[int],
) -> Float[Array, "B H N M"]:
    """`q[i, j] . (height_rel[u - i + U - 1] + width_rel[v - j + V - 1])` for keys (u, v) of a map of `shape` (U, V).

    Queries and keys are in row-major order, both counted from the first row and column of their own map.

    Raises:
      ValueError: tables of other than `2 U - 1` and `2 V - 1` rows; more queries than keys along an axis.
    """
    check_tables(q, height_rel, width_rel, shape)
    if q.shape[1] > shape[0] or q.shape[2] > shape[1]:
        raise ValueError(f"relative logits: a map of queries {q.shape[1:3]} is larger than that of keys {tuple(shape)}")
    # Rows of the tables are picked, not logits: a table is small, and only pairs that exist are multiplied.
    rows, columns = (
        _picked(table.astype(q.dtype), np.arange(queries), keys)
        for table, queries, keys in zip((height_rel, width_rel), q.shape[1:3], shape, strict=True)
    )
    down = product("bijhd,iud->bhiju", q, rows)
    right = product("bijhd,jvd->bhijv", q, columns)
    logits = down[..., :, None] + right[..., None, :]
    return logits.reshape(*logits.shape[:2], q.shape[1] * q.shape[2], shape[0] * shape[1])


def relative_logits_of(
    q: Float[Array, "B Q H D"],
    places: Sequence[Int[Array, " Q"]],
    height_rel: Float[Array, "R D"],
    width_rel: Float[Array, "S D"],
    shape: Sequence[int],
) -> Float[Array, "B H Q M"]:
    """Rows of `relative_logits`: those of queries at chosen places.

    Args:
      places: rows and columns of the queries.
    """
    check_tables(q, height_rel, width_rel, shape)
    rows, columns = (
        _picked(table.astype(q.dtype), own, keys)
        for table, own, keys in zip((height_rel, width_rel), places, shape, strict=True)
    )
    down = product("bqhd,qud->bhqu", q, rows)
    right = product("bqhd,qvd->bhqv", q, columns)
    logits = down[..., :, None] + right[..., None, :]
    return logits.reshape(*logits.shape[:3], shape[0] * shape[1])


def check_tables(q: Any, height_rel: Any, width_rel: Any, shape: Sequence[int]) -> None:
    """ValueError for tables of other than `2 n - 1` rows for n keys along an axis, as wide as a head."""
    rows, wide = tuple(2 * n - 1 for n in shape), q.shape[-1]
    if (height_rel.shape[0], width_rel.shape[0]) != rows:
        raise ValueError(
            f"relative logits: keys on a map of {tuple(shape)} need tables of {rows[0]} and {rows[1]} rows, not "
            f"{height_rel.shape[0]} and {width_rel.shape[0]}"
        )
    for name, table in (("height_rel", height_rel), ("width_rel", width_rel)):
        if table.shape[1:] != (wide,) or not jnp.issubdtype(table.dtype, jnp.floating):
            raise ValueError(
                f"{name} {table.dtype}{list(table.shape)}: must be floating point [rows, {wide}], as wide as a head"
            )


def _picked(table: Float[Array, "R D"], places: Int[Any, " Q"], keys: int) -> Float[Array, "Q U D"]:
    """Of queries at these places along an axis, the embedding of each key's displacement."""
    return jnp.take(table, np.arange(keys) - places[:, None] + keys - 1, axis=0)
