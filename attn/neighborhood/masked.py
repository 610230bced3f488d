"""Neighborhood attention as dense attention under a mask: all pairs of tokens are there to be looked at.

What a call can have besides its pattern goes through here: a mask, dropout, and edits of logits and probabilities.
Memory grows with the square of the number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from attn.common.relative import relative_position_bias
from attn.core.numerics import Edit
from attn.dense import xla
from kernels.neighborhood.pattern import Pattern


def plain(
    q: Float[Array, "B *S H D"],
    k: Float[Array, "B *S K D"],
    v: Float[Array, "B *S K E"],
    bias: Float[Array, "H ..."] | None,
    extra_keys: Float[Array, "B M K D"] | None,
    extra_values: Float[Array, "B M K E"] | None,
    *,
    pattern: Pattern,
    scale: float,
    extra_queries: Float[Array, "B P H D"] | None = None,
    mask: Bool[Array, "#B #H #N #W"] | None = None,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    edit: Edit | None = None,
) -> tuple[Array, Array]:
    """Output and logsumexp, of the map `[B, *S, H, E]`; with extra queries, which see everything, of all tokens
    `[B, P + N, H, E]`, those first. Extra keys come before the keys of the map. Other arguments as in
    `neighborhood_attention`.
    """

    def tokens(array: Array, extra: Array | None) -> Array:
        flat = array.reshape(array.shape[0], pattern.tokens, *array.shape[-2:])
        return flat if extra is None else jnp.concatenate([extra, flat], axis=1)

    before = 0 if extra_keys is None else extra_keys.shape[1]
    first = 0 if extra_queries is None else extra_queries.shape[1]
    around = ((first, 0), (before, 0))
    # In NumPy, so that no program has to find out which rows are empty: a compiler takes its time for that.
    seen: Any = np.pad(pattern.mask(), around, constant_values=True)[None, None]
    spread = None
    if bias is not None:
        # The table on members of dilation groups, as one on places: what lies outside the window is masked.
        table = _spread(bias, pattern)
        spread = jnp.pad(relative_position_bias(table, pattern.shape), ((0, 0), *around))[None]
    out, lse = xla.plain(
        tokens(q, extra_queries),
        tokens(k, extra_keys),
        tokens(v, extra_values),
        scale=scale,
        with_lse=True,
        mask=seen if mask is None else seen & mask,
        bias=spread,
        dropout=dropout,
        key=key,
        edit=edit,
    )
    return (out, lse) if extra_queries is not None else (out.reshape(*q.shape[:-1], -1), lse.reshape(q.shape[:-1]))


def _spread(table: Float[Array, H * R], pattern: Pattern) -> Float[Array, H * R2]:
    """A table over members of dilation groups as one over places; what no pair in a window has is anything."""
    sizes: Sequence[tuple[int, int, int]] = [(axis.length, axis.window, axis.dilation) for axis in pattern.axes]
    for axis, (n, w, d) in enumerate(sizes, start=1):
        member = np.clip(np.arange(1 - n, n) // d + w - 1, 0, 2 * w - 2)
        table = jnp.take(table, member, axis=axis)
    return table
