"""Neighborhood attention in plain JAX: tiles of queries, each with one halo of keys, and dense products inside a tile.

The default where no kernel is had. A loop over blocks of tiles keeps what is gathered and computed at a time small, so
that the memory it takes beyond its arguments and results hardly depends on the window. The backward pass computes the
probabilities again from the logsumexp, as in FlashAttention-2 (arXiv:2307.08691, section 3.1.2). Arguments and results
of the three functions: docs/neighborhood.md.

Letters in shapes: P key heads and B examples of a chunk, C tiles of a block, T queries of a tile, G query heads of a
key head, N tokens, W keys of a halo with the extra keys after them. Extra keys are keys N, N + 1, ...
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from attn.core.numerics import product
from attn.core.shards import varying, varying_axes
from attn.neighborhood.tiles import Arrays, Tiling, tiling
from kernels.neighborhood.pattern import Pattern

Gradients = tuple[Array, Array, Array, Array | None, Array | None, Array | None]


class Dropout(NamedTuple):
    """Share of probabilities set to zero (the rest scaled up), and the keys of each example and key head `[B, K]`."""

    rate: float
    keys: PRNGKeyArray


def forward(
    q: Float[Array, "B *S H D"],
    k: Float[Array, "B *S K D"],
    v: Float[Array, "B *S K E"],
    bias: Float[Array, "H ..."] | None,
    extra_keys: Float[Array, "B M K D"] | None,
    extra_values: Float[Array, "B M K E"] | None,
    *,
    pattern: Pattern,
    scale: float,
) -> tuple[Float[Array, "B *S H E"], Float[Array, "B *S H"]]:
    """Output in the dtype of `v`, and the logsumexp of every query in float32."""
    if not isinstance(q.shape[0], int):
        # A program that is exported for any batch: chunks are cut by numbers, so they have all examples.
        def of_one(*arrays: Any) -> Any:
            arrays = jax.tree.map(lambda array: array[None], arrays)
            found = forward(*arrays[:3], bias, *arrays[3:], pattern=pattern, scale=scale)
            return jax.tree.map(lambda array: array[0], found)

        return jax.vmap(of_one)(q, k, v, extra_keys, extra_values)
    tiles = tiling(q, k, v, extra_keys, pattern)
    return forward_tiles(tiles, q, k, v, bias, extra_keys, extra_values, scale=scale)


def forward_tiles(
    tiles: Tiling,
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    extra_keys: Array | None,
    extra_values: Array | None,
    *,
    scale: float,
    dropout: Dropout | None = None,
) -> tuple[Array, Array]:
    """`forward` with a pattern that is cut into tiles."""
    table = tiles.table(bias)

    def chunk(arrays: Arrays) -> tuple[Array, Array]:
        keys = arrays.pop("keys", None)

        def block(cells: Int[Array, " C"]) -> tuple[Array, Array]:
            tile = tiles.gather(arrays, table, cells)
            logits = _logits(tile, scale)
            largest = logits.max(axis=-1, keepdims=True)
            weights = jnp.exp(logits - largest)
            total = weights.sum(axis=-1)
            mixed = weights if dropout is None else weights * _kept(dropout.rate, keys, cells, weights)
            out = product("pbctgw,pbcwe->pbctge", mixed.astype(v.dtype), tile["v"]) / total[..., None]
            return out.astype(v.dtype), largest[..., 0] + jnp.log(total)

        return jax.tree.map(tiles.to_tokens, jax.lax.map(block, tiles.blocks))

    arrays = tiles.chunks({"q": q}, {"k": (k, extra_keys), "v": (v, extra_values)}) | _keys(tiles, dropout)
    out, lse = jax.lax.map(chunk, arrays)
    return tiles.heads_last(out).reshape(*q.shape[:-1], -1), tiles.heads_last(lse).reshape(q.shape[:-1])


def backward(
    q: Float[Array, "B *S H D"],
    k: Float[Array, "B *S K D"],
    v: Float[Array, "B *S K E"],
    bias: Float[Array, "H ..."] | None,
    extra_keys: Float[Array, "B M K D"] | None,
    extra_values: Float[Array, "B M K E"] | None,
    out: Float[Array, "B *S H E"],
    lse: Float[Array, "B *S H"],
    d_out: Float[Array, "B *S H E"],
    d_lse: Float[Array, "B *S H"] | None,
    *,
    pattern: Pattern,
    scale: float,
) -> Gradients:
    """Gradients of the six arrays, each in its dtype; None for what is None."""
    tiles = tiling(q, k, v, extra_keys, pattern)
    return backward_tiles(tiles, q, k, v, bias, extra_keys, extra_values, out, lse, d_out, d_lse, scale=scale)


def backward_tiles(
    tiles: Tiling,
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    extra_keys: Array | None,
    extra_values: Array | None,
    out: Array,
    lse: Array,
    d_out: Array,
    d_lse: Array | None,
    *,
    scale: float,
    dropout: Dropout | None = None,
) -> Gradients:
    """`backward` with a pattern that is cut into tiles."""
    table = tiles.table(bias)
    of_queries = {"q": q, "d_out": d_out.astype(v.dtype), "lse": lse}
    if d_lse is not None:
        of_queries["d_lse"] = d_lse

    # Under a shard_map that checks it, sums vary over devices as what they are of does.
    axes = varying_axes((q, k, v, bias, extra_keys, d_out))
    zeros = None if bias is None else varying(jnp.zeros_like(table), axes)

    def chunk(d_table: Array | None, arrays: Arrays) -> tuple[Array | None, Arrays]:
        keys = arrays.pop("keys", None)

        def block(sums: Arrays, cells: Int[Array, " C"]) -> tuple[Arrays, Array]:
            tile = tiles.gather(arrays, table, cells)
            # A place of a tile without a query has the token of another; it must not count twice.
            lse = jnp.where(tile["is_query"], tile["lse"], jnp.inf)
            probabilities = jnp.exp(_logits(tile, scale) - lse[..., None])
            d_probabilities = product("pbctge,pbcwe->pbctgw", tile["d_out"], tile["v"])
            mixed = probabilities
            if dropout is not None:
                kept = _kept(dropout.rate, keys, cells, probabilities)
                mixed, d_probabilities = probabilities * kept, d_probabilities * kept
            # rowsum(d_out * out) would do, with the rounding of `out`: in half precision that is most of the error.
            delta = (probabilities * d_probabilities).sum(axis=-1)
            if d_lse is not None:
                delta -= tile["d_lse"]
            d_logits = probabilities * (d_probabilities - delta[..., None])
            d_products = (scale * d_logits).astype(q.dtype)
            dk = product("pbctgw,pbctgd->pbcwd", d_products, tile["q"])
            dv = product("pbctgw,pbctge->pbcwe", mixed.astype(v.dtype), tile["d_out"])
            dq = product("pbctgw,pbcwd->pbctgd", d_products, tile["k"])
            return tiles.add(sums, tile, dk, dv, d_logits), dq.astype(q.dtype)

        first = tiles.zeros(arrays, None if bias is None else table)
        sums, dq = jax.lax.scan(block, jax.tree.map(lambda x: varying(x, axes), first), tiles.blocks)
        if d_table is not None:
            d_table = tiles.add_table(d_table, sums["table"], arrays["head"])
        return d_table, {"q": tiles.to_tokens(dq), "k": sums["k"].astype(k.dtype), "v": sums["v"].astype(v.dtype)}

    arrays = tiles.chunks(of_queries, {"k": (k, extra_keys), "v": (v, extra_values)}) | _keys(tiles, dropout)
    d_table, gradients = jax.lax.scan(chunk, zeros, arrays)
    dq, dk, dv = (tiles.heads_last(gradients[name]) for name in ("q", "k", "v"))
    d_bias = None
    if bias is not None and d_table is not None:
        d_bias = tiles.fold(d_table).reshape(bias.shape).astype(bias.dtype)
    near = tiles.tokens
    d_extra = (None, None) if extra_keys is None else (dk[:, near:], dv[:, near:])
    return dq.reshape(q.shape), dk[:, :near].reshape(k.shape), dv[:, :near].reshape(v.shape), d_bias, *d_extra


def _logits(tile: Arrays, scale: float) -> Float[Array, "P B C T G W"]:
    return scale * product("pbctgd,pbcwd->pbctgw", tile["q"], tile["k"]) + tile["table"]


def _keys(tiles: Tiling, dropout: Dropout | None) -> Arrays:
    return {} if dropout is None else {"keys": tiles.of_heads(dropout.keys)}


def _kept(
    rate: float, keys: Key[Array, "P B"], cells: Int[Array, " C"], like: Float[Array, "P B C T G W"]
) -> Float[Array, "P B C T G W"]:
    """What probabilities are multiplied by: 0, or 1 over the share that is kept. The same for a tile in any block."""

    def of_tile(key: PRNGKeyArray, cell: Array) -> Array:
        kept = jax.random.bernoulli(jax.random.fold_in(key, cell), 1 - rate, like.shape[3:])
        return jnp.where(kept, 1 / (1 - rate), 0.0)

    of_block = jax.vmap(of_tile, (None, 0))
    return jax.vmap(jax.vmap(of_block, (0, None)), (0, None))(keys, cells)
