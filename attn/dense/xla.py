"""Dense attention by the compiler, which keeps the map of all pairs: takes a mask, a bias, dropout, and hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray


def unfused(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M H D"],
    v: Float[Array, "B M H E"],
    *,
    scale: float,
    mask: Bool[Array, "#B #H #N M"] | None = None,
    bias: Float[Array, "#B #H N M"] | None = None,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    edit: Callable[[str, Array], Array] = lambda site, value: value,
) -> Float[Array, "B N H E"]:
    """`softmax(scale * q k^T + bias) v`; arguments as in `dense_attention`. `edit` sees logits and probabilities."""
    # Heads first makes each matrix product contiguous: on a CPU this is worth a factor of two, elsewhere it is free.
    # The scale goes on q, which is smaller than the logits.
    q, k, v = (jnp.swapaxes(array, 1, 2) for array in (q * scale, k, v))
    logits = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias
    logits = edit("logits", logits)
    probs = edit("probs", _softmax(logits, mask))
    probs = dropped(probs, dropout, key)
    heads = jnp.einsum("bhnm,bhme->bhne", probs.astype(v.dtype), v)
    return jnp.swapaxes(heads, 1, 2)


def dropped(probs: Float[Array, "*N"], rate: float, key: PRNGKeyArray | None) -> Float[Array, "*N"]:
    """Probabilities of which this share is zero and the rest scaled up. ValueError without a key for a rate."""
    if not rate:
        return probs
    if key is None:
        raise ValueError("attention dropout needs a key: call the model with key=...")
    kept = jax.random.bernoulli(key, 1 - rate, probs.shape)
    return jnp.where(kept, probs / (1 - rate), 0)


def _softmax(logits: Float[Array, "B H N M"], mask: Bool[Array, "#B #H #N M"] | None) -> Float[Array, "B H N M"]:
    """Softmax over the last axis where the mask allows it; a row with no allowed entry is all zeros, not uniform."""
    if mask is None:
        return jax.nn.softmax(logits, axis=-1)
    masked = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    return jnp.where(mask, jax.nn.softmax(masked, axis=-1), 0)


def refuse(*inputs: Any, beside: tuple[str, ...]) -> str | None:
    """None: there is nothing that this implementation cannot compute."""
    return None


def forward(q: Array, k: Array, v: Array, *, scale: float) -> tuple[Float[Array, "B N H E"]]:
    """The output, for a backward pass that keeps no map."""
    return (unfused(q, k, v, scale=scale),)


def backward(
    q: Array, k: Array, v: Array, d_out: Float[Array, "B N H E"], *, scale: float
) -> tuple[Array, Array, Array]:
    """Gradients of q, k, v; the map is computed again."""
    return jax.vjp(lambda *inputs: forward(*inputs, scale=scale)[0], q, k, v)[1](d_out)
