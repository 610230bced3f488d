"""Outlook attention from packed projections to a packed output, for `benchmarks.tpu_cycles` (docs/families/volo.md)."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from attn.outlook.api import outlook_attention

PLACES = 9


def both(
    logits: Float[Array, "B V U HOI"],
    v: Float[Array, "B Y X HD"],
    d_out: Float[Array, "B Y X HD"],
    *,
    heads: int,
    name: str,
) -> tuple[Array, Array, Array]:
    """The output and both gradients, by the implementation of this name, windows of 3 at every other place."""

    def attention(logits: Array, v: Array) -> Array:
        weights = logits.reshape(*logits.shape[:3], heads, PLACES, PLACES)
        values = v.reshape(*v.shape[:3], heads, -1)
        return outlook_attention(weights, values, implementation=name).reshape(v.shape)

    out, backward = jax.vjp(attention, logits, v)
    return out, *backward(d_out)
