"""Dense attention in plain JAX, which keeps the map of all pairs: takes everything that dense attention takes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from attn.core.numerics import Edit, dropped, edited, logsumexp, masked, product, softmax


def plain(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M K D"],
    v: Float[Array, "B M K E"],
    *,
    scale: float | Array,
    with_lse: bool = False,
    mask: Bool[Array, "#B #H #N M"] | None = None,
    bias: Float[Array, "#B #H #N #M"] | None = None,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    edit: Edit | None = None,
) -> tuple[Array, ...]:
    """Output and, with `with_lse`, the logsumexp; arguments as in `dense_attention`."""
    logits = scaled_logits(q, k, scale=scale, mask=mask, bias=bias)
    logits = edited(edit, "logits", logits)
    probs = edited(edit, "probs", softmax(logits, mask))
    v = repeated(jnp.swapaxes(v, 1, 2), q.shape[2])
    mixed = dropped(probs, dropout, key).astype(v.dtype)
    out = jnp.swapaxes(product("bhnm,bhme->bhne", mixed, v).astype(v.dtype), 1, 2)
    return (out, jnp.swapaxes(logsumexp(logits, mask), 1, 2)) if with_lse else (out,)


def scaled_logits(
    q: Float[Array, "B N H D"], k: Float[Array, "B M K D"], *, scale: float | Array, mask: Any = None, bias: Any = None
) -> Float[Array, "B H N M"]:
    """What the softmax is taken of, in float32; arguments as in `dense_attention`."""
    # Heads first makes each matrix product contiguous: on a CPU this is worth a factor of two, elsewhere it is free.
    q, k = (jnp.swapaxes(array, 1, 2) for array in (q, k))
    logits = scale * product("bhnd,bhmd->bhnm", q, repeated(k, q.shape[1]))
    return masked(logits if bias is None else logits + bias, mask)


def repeated(array: Float[Array, "B K N D"], heads: int) -> Float[Array, "B H N D"]:
    """Key heads for their query heads: query head h reads key head `h // (H // K)`."""
    return array if array.shape[1] == heads else jnp.repeat(array, heads // array.shape[1], axis=1)


def forward(q: Array, k: Array, v: Array, *, scale: float, with_lse: bool) -> tuple[Array, ...]:
    """Output and logsumexp, for a backward pass that keeps no map."""
    return plain(q, k, v, scale=scale, with_lse=with_lse)


def backward(
    q: Array, k: Array, v: Array, *cotangents: Any, scale: float, with_lse: bool
) -> tuple[Array, Array, Array]:
    """Gradients of q, k, v; the map is computed again."""
    results, pullback = jax.vjp(lambda *inputs: plain(*inputs, scale=scale, with_lse=with_lse), q, k, v)
    return pullback(tuple(d.astype(result.dtype) for d, result in zip(cotangents, results, strict=True)))
