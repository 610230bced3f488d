"""Logits by relative position that depend on the query, one table for rows and one for columns; attention with them.

Such embeddings are those of Attention Augmented Convolutional Networks (arXiv:1904.09925), BoTNet
(arXiv:2101.11605) and HaloNet (arXiv:2103.12731). All heads share a table.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


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
    if (height_rel.shape[0], width_rel.shape[0]) != tuple(2 * n - 1 for n in shape):
        raise ValueError(
            f"relative logits: keys on a map of {tuple(shape)} need tables of {2 * shape[0] - 1} and "
            f"{2 * shape[1] - 1} rows, not {height_rel.shape[0]} and {width_rel.shape[0]}"
        )
    if q.shape[1] > shape[0] or q.shape[2] > shape[1]:
        raise ValueError(f"relative logits: a map of queries {q.shape[1:3]} is larger than that of keys {tuple(shape)}")
    # Rows of the tables are picked, not logits: a table is small, and only pairs that exist are multiplied.
    rows, columns = (
        jnp.take(table.astype(q.dtype), np.arange(keys) - np.arange(queries)[:, None] + keys - 1, axis=0)
        for table, queries, keys in zip((height_rel, width_rel), q.shape[1:3], shape, strict=True)
    )
    down = jnp.einsum("bijhd,iud->bhiju", q, rows, preferred_element_type=jnp.float32)
    right = jnp.einsum("bijhd,jvd->bhijv", q, columns, preferred_element_type=jnp.float32)
    logits = down[..., :, None] + right[..., None, :]
    return logits.reshape(*logits.shape[:2], q.shape[1] * q.shape[2], shape[0] * shape[1])
