"""How numbers are computed in attention: products, softmax and dropout, the same in every implementation by XLA.

Float32 is multiplied as such, where a TPU's default would round it to bfloat16 first; narrower types are multiplied as
they are and summed in float32. The scale goes on the logits, which are float32, not on queries, which it would round.
Softmax runs in float32 whatever the inputs are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray


def precision(dtype: Any) -> jax.lax.Precision | None:
    """Of a product of arrays of this type."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def product(equation: str, left: Array, right: Array) -> Array:
    """An einsum of two arrays of one type, in float32."""
    return jnp.einsum(equation, left, right, precision=precision(left.dtype), preferred_element_type=jnp.float32)


def masked(logits: Float[Array, "*N M"], mask: Bool[Array, "*S"] | None) -> Float[Array, "*N M"]:
    """The smallest number where a mask is False: its exponential is 0, and its derivatives are no NaN."""
    return logits if mask is None else jnp.where(mask, logits, jnp.finfo(logits.dtype).min)


def softmax(logits: Float[Array, "*N M"], mask: Bool[Array, "*S"] | None) -> Float[Array, "*N M"]:
    """Probabilities over the last axis of masked logits; a row with no allowed entry is all zeros, not uniform."""
    probs = jax.nn.softmax(logits, axis=-1)
    return probs if mask is None else jnp.where(mask.any(axis=-1, keepdims=True), probs, 0)


def logsumexp(logits: Float[Array, "*N M"], mask: Bool[Array, "*S"] | None) -> Float[Array, "*N"]:
    """Of masked logits over the last axis; -inf for a row with no allowed entry."""
    lse = jax.nn.logsumexp(logits, axis=-1)
    return lse if mask is None else jnp.where(mask.any(axis=-1), lse, -jnp.inf)


Edit = Callable[[str, Array], Array]
"""`edit(site, value) -> value` sees, and may change, the `"logits"` (after the mask) and the `"probs"` of a call."""


def edited(edit: Edit | None, site: str, value: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """What an edit makes of a value, float32.

    Raises:
      ValueError: it gives no array of that shape.
    """
    if edit is None:
        return value
    answer = edit(site, value)
    shape = getattr(answer, "shape", None)
    if shape != value.shape:
        given = answer if shape is None else list(shape)
        raise ValueError(f"edit of {site!r} gave {given!r:.80}; allowed: an array {list(value.shape)}, as it was given")
    return answer.astype(value.dtype)


def dropped(probs: Float[Array, "*N"], rate: float, key: PRNGKeyArray | None) -> Float[Array, "*N"]:
    """Probabilities of which this share is zero and the rest scaled up.

    Raises:
      ValueError: no key for a rate.
    """
    if not rate:
        return probs
    if key is None:
        raise ValueError("attention dropout needs a key: call the model with key=...")
    kept = jax.random.bernoulli(key, 1 - rate, probs.shape)
    return jnp.where(kept, probs / (1 - rate), 0)
