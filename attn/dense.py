"""Softmax attention between all pairs of tokens (Vaswani et al. 2017, arXiv:1706.03762, eq. 1)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, PRNGKeyArray

Hook = Callable[[str, Array, Any], Array]
"""`hook(site, value, layer) -> value` sees, and may edit, what an attention module computes. Sites: `"q" "k" "v"`
`[B, N, H, D]`, `"logits" "probs"` `[B, H, N, M]`, `"heads"` `[B, N, H, D]` (per-head outputs before the projection)."""


def dense_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M H D"],
    v: Float[Array, "B M H E"],
    *,
    mask: Bool[Array, "#B #H #N M"] | None = None,
    bias: Float[Array, "#B #H N M"] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    hook: Hook | None = None,
    layer: Any = None,
) -> Float[Array, "B N H E"]:
    """`softmax(scale * q k^T + bias) v`, every head on its own.

    Args:
      mask: True where a query may look. A query with nothing to look at gets zeros.
      bias: added to the scaled logits.
      scale: `D ** -0.5` unless given.
      dropout: share of probabilities set to zero (the rest scaled up); needs `key`.
      hook: may edit `"q" "k" "v" "logits" "probs" "heads"`; its presence selects this unfused path on every platform.
      layer: handed to the hook.

    The softmax runs in float32 whatever the inputs are; the result has the dtype of `v`.
    """
    edit = (lambda site, value: hook(site, value, layer)) if hook else (lambda site, value: value)
    q, k, v = edit("q", q), edit("k", k), edit("v", v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    # Heads first makes each matrix product contiguous: on a CPU this is worth a factor of two, elsewhere it is free.
    # The scale goes on q, which is smaller than the logits.
    q, k, v = (jnp.swapaxes(array, 1, 2) for array in (q * scale, k, v))
    logits = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias
    logits = edit("logits", logits)
    probs = edit("probs", _softmax(logits, mask))
    if dropout:
        if key is None:
            raise ValueError("attention dropout needs a key: call the model with key=...")
        kept = jax.random.bernoulli(key, 1 - dropout, probs.shape)
        probs = jnp.where(kept, probs / (1 - dropout), 0)
    heads = jnp.einsum("bhnm,bhme->bhne", probs.astype(v.dtype), v)
    return edit("heads", checkpoint_name(jnp.swapaxes(heads, 1, 2), "attention_heads"))


def _softmax(logits: Float[Array, "B H N M"], mask: Bool[Array, "#B #H #N M"] | None) -> Float[Array, "B H N M"]:
    """Softmax over the last axis where the mask allows it; a row with no allowed entry is all zeros, not uniform."""
    if mask is None:
        return jax.nn.softmax(logits, axis=-1)
    masked = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    return jnp.where(mask, jax.nn.softmax(masked, axis=-1), 0)
