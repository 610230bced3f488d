"""Attention between channels: the channels of a group are what attends, their values at all places what is compared.

Channel group attention of DaViT (arXiv:2204.03645, section 3.3). Its cost is linear in the number of places.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from attn.dense.api import Hook, dense_attention


def channel_attention(
    q: Float[Array, "B N G D"],
    k: Float[Array, "B N G D"],
    v: Float[Array, "B N G D"],
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    hook: Hook | None = None,
    layer: Any = None,
) -> Float[Array, "B N G D"]:
    """`softmax(scale * q^T k) v^T` within each group of D channels, over all N places at once.

    Args:
      scale: `D ** -0.5` unless given, as in DaViT; Florence-2 has `N ** -0.5`.
      dropout: share of the probabilities set to zero (the rest scaled up); needs `key`.
      hook: as in `dense_attention`, with channels in the place of tokens: `"q" "k" "v" "heads"` are `[B, D, G, N]`,
        `"logits" "probs"` `[B, G, D, D]`.
      layer: handed to the hook.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # The same product as of tokens, with the axes of places and channels exchanged. D is small: no kernel is for it.
    heads = dense_attention(
        *(jnp.swapaxes(x, 1, 3) for x in (q, k, v)),
        scale=scale,
        dropout=dropout,
        key=key,
        hook=hook,
        layer=layer,
        implementation="xla",
    )
    return jnp.swapaxes(heads, 1, 3)
