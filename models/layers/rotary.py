"""Rotary positions: queries and keys turned by an angle for each pair of channels (RoFormer, arXiv:2104.09864)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotary_angles(places: Int[Array, "*B N"], head_width: int, *, base: float = 10_000.0) -> Float[Array, "*B N half"]:
    """Angles `place * base ** (-2 i / head_width)` of pair i, in float32.

    ValueError for an odd width.
    """
    if head_width % 2:
        raise ValueError(f"head width {head_width}: rotary positions turn pairs of channels, so it has to be even")
    frequencies = base ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    return places[..., None].astype(jnp.float32) * frequencies


def rotated(x: Float[Array, "B N H D"], angles: Float[Array, "*B N half"]) -> Float[Array, "B N H D"]:
    """Channel i and channel i + D / 2 of every head turned by angle i, in the dtype of x (GPT-NeoX's order of
    pairs)."""
    cos, sin = (f(angles)[..., None, :] for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
