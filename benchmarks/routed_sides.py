"""What `benchmarks/routed_tpu.py` compiles: attention to routed regions by this project's kernel and by XLA.

Every side takes packed projections `[B, Y, X, H * D]` as a linear layer gives them and the routing `[B, R, topk]`, and
returns a packed output; where it is given the cotangent of that, the three packed gradients beside it. So each pays for
the layout that it wants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attn.routed.api import routed_attention

Packed = Float[Array, "B Y X HD"]
Indices = Int[Array, "B R topk"]


def _run(function: Callable[..., Array], arguments: tuple[Array, ...], cotangents: tuple[Array, ...]) -> tuple:
    """The output, and where there is a cotangent the gradients."""
    if not cotangents:
        return (function(*arguments),)
    out, backward = jax.vjp(function, *arguments)
    return (out, *backward(cotangents[0]))


def operator(
    q: Packed, k: Packed, v: Packed, indices: Indices, *cotangents: Packed, heads: int, regions: int, name: str
) -> tuple:
    """`attn.routed.api.routed_attention` by the implementation of this name."""

    def attention(q: Array, k: Array, v: Array) -> Array:
        return _operator(q, k, v, indices, heads, regions, name)

    return _run(attention, (q, k, v), cotangents)


def _operator(q: Packed, k: Packed, v: Packed, indices: Indices, heads: int, regions: int, name: str) -> Packed:
    shape, scale = q.shape, q.shape[-1] ** -0.5
    q, k, v = (x.reshape(*x.shape[:-1], heads, -1) for x in (q, k, v))
    out = routed_attention(q, k, v, indices, regions=(regions, regions), scale=scale, implementation=name)
    return out.reshape(shape)


def layer(
    x: Packed,
    into: Float[Array, "HD 3HD"],
    out_of: Float[Array, "HD HD"],
    indices: Indices,
    *cotangents: Packed,
    heads: int,
    regions: int,
    name: str,
) -> tuple:
    """The operator between its projections, so that the layout of q, k and v is the compiler's choice."""

    def run(x: Array, into: Array, out_of: Array) -> Array:
        q, k, v = jnp.split(x @ into, 3, axis=-1)
        return _operator(q, k, v, indices, heads, regions, name) @ out_of

    return _run(run, (x, into, out_of), cotangents)


def xla(
    q: Packed, k: Packed, v: Packed, indices: Indices, *cotangents: Packed, heads: int, regions: int, gather: str
) -> tuple:
    """Regions gathered by index (`"index"`) or by a product with zeros and ones (`"one_hot"`), then dense products."""
    scale = q.shape[-1] ** -0.5

    def selected(x: Array) -> Array:
        if gather == "index":
            chosen = jax.vmap(lambda x, at: x[at])(x, indices)
        else:
            chosen = jnp.einsum("brkn,bntc->brktc", jax.nn.one_hot(indices, x.shape[1], dtype=x.dtype), x)
        return chosen.reshape(*chosen.shape[:2], -1, heads, x.shape[-1] // heads)

    def attention(q: Array, k: Array, v: Array) -> Array:
        queries, keys, values = (_to_regions(x, regions) for x in (q, k, v))
        queries = queries.reshape(*queries.shape[:-1], heads, -1)
        keys, values = selected(keys), selected(values)
        logits = scale * jnp.einsum("brqhd,brkhd->brhqk", queries, keys, preferred_element_type=jnp.float32)
        out = jnp.einsum("brhqk,brkhd->brqhd", jax.nn.softmax(logits).astype(v.dtype), values)
        return _from_regions(out.reshape(*out.shape[:3], -1), regions, q.shape)

    return _run(attention, (q, k, v), cotangents)


def _to_regions(x: Packed, regions: int) -> Float[Array, "B R T C"]:
    batch, height, width, channels = x.shape
    x = x.reshape(batch, regions, height // regions, regions, width // regions, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, regions**2, -1, channels)


def _from_regions(x: Float[Array, "B R T C"], regions: int, shape: tuple[Any, ...]) -> Packed:
    batch, height, width, channels = shape
    x = x.reshape(batch, regions, regions, height // regions, width // regions, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(shape)
