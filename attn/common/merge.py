"""Attention over a set of keys from attention over its parts (FlashAttention, arXiv:2205.14135, section 3.1)."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float


def merge_attention(
    outputs: Sequence[Float[Array, "*B H D"]], logsumexps: Sequence[Float[Array, "*B H"]]
) -> tuple[Float[Array, "*B H D"], Float[Array, "*B H"]]:
    """The output and logsumexp of attention over the union of disjoint sets of keys.

    With `o_i` the output over set i and `l_i` the natural logarithm of the sum of `exp(scaled logit)` over its keys,

        l = log(sum_i exp(l_i)),   o = sum_i exp(l_i - l) o_i.

    A set without keys has `l_i = -inf` and an output that counts for nothing; if no set has any, the output is 0 and
    `l = -inf`. Computed in float32; the output has the dtype of the first. Differentiable in all arguments.

    Raises:
      ValueError: there is nothing to merge, or not one logsumexp for each output.
    """
    if not outputs or len(outputs) != len(logsumexps):
        raise ValueError(f"{len(outputs)} outputs cannot be merged with {len(logsumexps)} logsumexps")
    lse = jnp.stack([part.astype(jnp.float32) for part in logsumexps])
    largest = lse.max(axis=0)
    # Shifted by a finite number, so that a query without any key gives no NaN, in gradients neither.
    shift = jnp.where(jnp.isfinite(largest), largest, 0.0)
    weights = jnp.exp(lse - shift)
    total = weights.sum(axis=0)
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    parts = jnp.stack([part.astype(jnp.float32) for part in outputs])
    parts = jnp.where(weights[..., None] > 0, parts, 0.0)
    merged = (weights[..., None] * parts).sum(axis=0) / safe[..., None]
    return merged.astype(outputs[0].dtype), jnp.where(seen, shift + jnp.log(safe), -jnp.inf)
