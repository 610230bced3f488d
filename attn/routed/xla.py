"""Routed attention by the compiler: keys and values of the routed regions are gathered by index, then dense products.

Heads go first, before the regions, so that what is gathered needs no transposition before a product. The backward pass
computes the probabilities again from the logsumexp and adds the gradients of what was gathered back to its regions.

Letters in shapes: R regions, T queries of a region, K regions that each is routed to, S keys of a region.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from attn.common.windows import from_windows, to_windows
from attn.core.numerics import Edit, dropped, edited, logsumexp, product, softmax
from attn.routed.routing import Regions


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
    queries, keys, values = (by_region(x, regions) for x in (q, k, v))
    logits = _logits(queries, gathered(keys, indices), scale)
    largest = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - largest)
    total = weights.sum(axis=-1)
    out = product("bhrtm,bhrme->bhrte", weights.astype(v.dtype), gathered(values, indices)) / total[..., None]
    lse = largest[..., 0] + jnp.log(total)
    shape = q.shape[1:3]
    return to_map(out.astype(v.dtype), shape, regions), to_map(lse[..., None], shape, regions)[..., 0]


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
    """Gradients of q, k and v, each in its dtype."""
    queries, keys, values, d_heads = (by_region(x, regions) for x in (q, k, v, d_out.astype(v.dtype)))
    keys, values = gathered(keys, indices), gathered(values, indices)
    probabilities = jnp.exp(_logits(queries, keys, scale) - by_region(lse[..., None], regions))
    d_probabilities = product("bhrte,bhrme->bhrtm", d_heads, values)
    # rowsum(d_out * out) would do, with the rounding of `out`: in half precision that is most of the error.
    delta = (probabilities * d_probabilities).sum(axis=-1, keepdims=True)
    if d_lse is not None:
        delta = delta - by_region(d_lse[..., None], regions)
    d_products = (scale * probabilities * (d_probabilities - delta)).astype(q.dtype)
    dq = product("bhrtm,bhrmd->bhrtd", d_products, keys)
    dk = scattered(product("bhrtm,bhrtd->bhrmd", d_products, queries), indices)
    dv = scattered(product("bhrtm,bhrte->bhrme", probabilities.astype(v.dtype), d_heads), indices)
    dq, dk, dv = (
        to_map(gradient.astype(like.dtype), like.shape[1:3], regions) for gradient, like in ((dq, q), (dk, k), (dv, v))
    )
    return dq, dk, dv


def plain(
    q: Float[Array, "B Y X H D"],
    k: Float[Array, "B V U H D"],
    v: Float[Array, "B V U H E"],
    indices: Int[Array, "B R K"],
    *,
    regions: Regions,
    scale: float,
    weights: Float[Array, "B R K"] | None = None,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    edit: Edit | None = None,
) -> tuple[Float[Array, "B Y X H E"], Float[Array, "B Y X H"]]:
    """What `forward` computes, kept for differentiation; weights multiply keys and values of the routed regions.

    `edit` sees `"logits"` and `"probs"` `[B, R, H, T, K * S]`.
    """
    queries, keys, values = (by_region(x, regions) for x in (q, k, v))
    keys, values = gathered(keys, indices), gathered(values, indices)
    if weights is not None:
        each = jnp.repeat(weights, keys.shape[-2] // weights.shape[-1], axis=-1)[:, None, :, :, None]
        keys, values = (each * keys).astype(k.dtype), (each * values).astype(v.dtype)
    logits = _edited(_logits(queries, keys, scale), "logits", edit)
    probabilities = _edited(softmax(logits, None), "probs", edit)
    probabilities = dropped(probabilities, dropout, key).astype(v.dtype)
    out = product("bhrtm,bhrme->bhrte", probabilities, values)
    lse = to_map(logsumexp(logits, None)[..., None], q.shape[1:3], regions)[..., 0]
    return to_map(out.astype(v.dtype), q.shape[1:3], regions), lse


# --- layouts ----------------------------------------------------------------------------------------------------------


def by_region(x: Float[Array, "B Y X H D"], regions: Regions) -> Float[Array, "B H R T D"]:
    """Heads, then regions, then the places of each, both in row-major order."""
    window = (x.shape[1] // regions[0], x.shape[2] // regions[1])
    x = to_windows(x, window).reshape(x.shape[0], regions[0] * regions[1], -1, *x.shape[3:])
    return jnp.moveaxis(x, 3, 1)


def to_map(x: Float[Array, "B H R T D"], shape: tuple[int, ...], regions: Regions) -> Float[Array, "B Y X H D"]:
    """Inverse of `by_region` for maps of `shape`."""
    window = (shape[0] // regions[0], shape[1] // regions[1])
    x = jnp.moveaxis(x, 1, 3)
    return from_windows(x.reshape(-1, *x.shape[2:]), shape, window)


def gathered(x: Float[Array, "B H R S D"], indices: Int[Array, "B R K"]) -> Float[Array, "B H R M D"]:
    """For each region the places of those that it is routed to, M = K * S, in the order of the indices."""
    batch, heads, count, _, dim = x.shape
    found = jax.vmap(jax.vmap(lambda regions, index: regions[index], (0, None)))(x, inside(indices, count))
    return found.reshape(batch, heads, count, -1, dim)


def scattered(x: Float[Array, "B H R M D"], indices: Int[Array, "B R K"]) -> Float[Array, "B H R S D"]:
    """Adjoint of `gathered`: what stands for one place in several routed regions, or for none, summed."""
    batch, heads, count, _, dim = x.shape
    x = x.reshape(batch, heads, count, indices.shape[-1], -1, dim)

    def add(parts: Array, index: Array) -> Array:
        return jnp.zeros((count, *parts.shape[2:]), parts.dtype).at[index].add(parts)

    return jax.vmap(jax.vmap(add, (0, None)))(x, inside(indices, count))


def inside(indices: Int[Array, "*B"], count: int) -> Int[Array, "*B"]:
    """The nearest numbers of regions that there are."""
    return jnp.clip(indices, 0, count - 1)


def _logits(
    queries: Float[Array, "B H R T D"], keys: Float[Array, "B H R M D"], scale: float
) -> Float[Array, "B H R T M"]:
    return scale * product("bhrtd,bhrmd->bhrtm", queries, keys)


def _edited(x: Float[Array, "B H R T M"], site: str, edit: Edit | None) -> Float[Array, "B H R T M"]:
    return x if edit is None else jnp.swapaxes(edited(edit, site, jnp.swapaxes(x, 1, 2)), 1, 2)
