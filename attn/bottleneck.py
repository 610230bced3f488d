"""Softmax attention between all places of a map with logits by relative position (BoTNet, arXiv:2101.11605)."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float, PRNGKeyArray

from attn.common.relative_logits import relative_logits
from attn.dense.api import Hook, dense_attention


def bottleneck_attention(
    q: Float[Array, "B Y X H D"],
    k: Float[Array, "B Y X H D"],
    v: Float[Array, "B Y X H E"],
    *,
    height_rel: Float[Array, "R D"],
    width_rel: Float[Array, "S D"],
    scale: float | None = None,
    scale_positions: bool = False,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    hook: Hook | None = None,
    layer: Any = None,
) -> Float[Array, "B Y X H E"]:
    """Softmax attention between all places of a map, with relative logits (BoTNet, arXiv:2101.11605).

    Args:
      height_rel, width_rel: `2 Y - 1` and `2 X - 1` rows, by displacement key - query from the most negative one on.
      scale: of the products `q k^T`; `D ** -0.5` unless given.
      scale_positions: relative logits are scaled too.
      dropout, key, hook, layer: as in `dense_attention`; the hook sees places as tokens.

    Raises:
      ValueError: tables for another map.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bias = relative_logits(q, height_rel, width_rel, q.shape[1:3])
    tokens = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (q, k, v))
    out = dense_attention(
        *tokens,
        bias=bias * scale if scale_positions else bias,
        scale=scale,
        dropout=dropout,
        key=key,
        hook=hook,
        layer=layer,
    )
    return out.reshape(*q.shape[:3], *out.shape[2:])
