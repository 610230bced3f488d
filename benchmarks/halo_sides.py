"""Halo attention from packed projections to a packed output, for `benchmarks.tpu_cycles` (docs/families/halonet.md)."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from attn.halo import halo_attention

Packed = Float[Array, "B Y X HD"]


def both(
    q: Packed,
    k: Packed,
    v: Packed,
    height_rel: Float[Array, "R D"],
    width_rel: Float[Array, "R D"],
    d_out: Packed,
    *,
    heads: int,
    block: int,
    halo: int,
) -> tuple[Array, ...]:
    """The output and all gradients."""

    def attention(q: Array, k: Array, v: Array, height_rel: Array, width_rel: Array) -> Array:
        q, k, v = (x.reshape(*x.shape[:3], heads, -1) for x in (q, k, v))
        out = halo_attention(q, k, v, block_size=block, halo_size=halo, height_rel=height_rel, width_rel=width_rel)
        return out.reshape(*out.shape[:3], -1)

    out, backward = jax.vjp(attention, q, k, v, height_rel, width_rel)
    return out, *backward(d_out)
