"""Keys and values of earlier tokens, for a decoder that goes on token by token."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attn import Mask, lengths

State = dict[str, Any]


def empty(batch: int, size: int, heads: int, width: int, dtype: Any = jnp.float32) -> State:
    """A cache for up to `size` tokens of one layer: `{"k", "v"}` `[B, size, H, D]`, and `"length"`, how many there
    are."""
    shape = (batch, size, heads, width)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype), "length": jnp.zeros((), jnp.int32)}


def extended(
    state: State, k: Float[Array, "B N H D"], v: Float[Array, "B N H D"], mask: Mask | None
) -> tuple[Float[Array, "B M H D"], Float[Array, "B M H D"], Mask, State]:
    """All keys and values, the mask of those that there are, and the new cache.

    More tokens than the cache has room for overwrite its last ones: how many fit is known to whoever made it.
    """
    begin = (0, state["length"], 0, 0)
    keys, values = (
        jax.lax.dynamic_update_slice(old, new.astype(old.dtype), begin)
        for old, new in ((state["k"], k), (state["v"], v))
    )
    length: Int[Array, ""] = state["length"] + k.shape[1]
    there = (Mask() if mask is None else mask) & lengths(jnp.full(k.shape[0], length))
    joined = dataclasses.replace(there, offset=state["length"])
    return keys.astype(k.dtype), values.astype(v.dtype), joined, {"k": keys, "v": values, "length": length}
