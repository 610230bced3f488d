"""Routed attention on small maps as dense attention under a mask, by the compiler.

All queries meet all keys, and the routes are added to the logits: the logarithm of how often a region is routed to,
which is minus infinity for never. TPUs gather slowly, so this is faster there while what is gathered is no small part
of the map, as on BiFormer's third stage. Letters in shapes: R regions, K regions that each is routed to.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attn.core.numerics import product
from attn.routed.routing import Regions, region_of_places
from attn.routed.xla import inside

MOST = 8
"""Places of a map for each that is gathered, above which gathering is faster (docs/kernels_routed.md)."""


def unprofitable(q: Any, k: Any, v: Any, indices: Any, *, regions: Regions) -> str | None:
    """Why these arguments are faster gathered; None if they are not."""
    share = math.prod(regions) / indices.shape[-1]
    return f"a map of {share:.1f} times what is gathered; above {MOST} gathering is faster" if share > MOST else None


def forward(
    q: Float[Array, "B Y X H D"],
    k: Float[Array, "B V U H D"],
    v: Float[Array, "B V U H E"],
    indices: Int[Array, "B R K"],
    *,
    regions: Regions,
    scale: float,
) -> tuple[Float[Array, "B Y X H E"], Float[Array, "B Y X H"]]:
    """Output in the dtype of `v`, and the logsumexp of every query in float32."""
    count = math.prod(regions)
    times = jax.nn.one_hot(inside(indices, count), count, dtype=jnp.float32).sum(axis=2)
    routes = jnp.log(times)[:, region_of_places(q, regions)][:, :, region_of_places(k, regions)]
    queries, keys, values = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (q, k, v))
    logits = scale * product("bnhd,bmhd->bhnm", queries, keys) + routes[:, None]
    largest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp(logits - largest)
    total = weights.sum(axis=-1, keepdims=True)
    out = product("bhnm,bmhe->bnhe", (weights / total).astype(v.dtype), values).astype(v.dtype)
    lse = jnp.swapaxes((largest + jnp.log(total))[..., 0], 1, 2)
    return out.reshape(*q.shape[:-1], v.shape[-1]), lse.reshape(q.shape[:-1])


def backward(
    q: Float[Array, "B Y X H D"],
    k: Float[Array, "B V U H D"],
    v: Float[Array, "B V U H E"],
    indices: Int[Array, "B R K"],
    out: Float[Array, "B Y X H E"],
    lse: Float[Array, "B Y X H"],
    d_out: Float[Array, "B Y X H E"],
    d_lse: Float[Array, "B Y X H"] | None,
    *,
    regions: Regions,
    scale: float,
) -> tuple[Float[Array, "B Y X H D"], Float[Array, "B V U H D"], Float[Array, "B V U H E"]]:
    """Gradients of q, k and v, each in its dtype: those of `forward` by differentiating it."""

    def run(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        return forward(q, k, v, indices, regions=regions, scale=scale)

    return jax.vjp(run, q, k, v)[1]((d_out.astype(v.dtype), jnp.zeros_like(lse) if d_lse is None else d_lse))
