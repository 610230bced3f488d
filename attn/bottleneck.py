"""Softmax attention between all places of a map with logits by relative position (BoTNet, arXiv:2101.11605)."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from attn.common.maps import check_lse, check_places
from attn.common.relative_logits import relative_logits, relative_logits_of
from attn.core.arguments import check_maps, shapes_of, usable_scale
from attn.core.numerics import Edit
from attn.dense.api import dense_attention, dense_maps


def bottleneck_attention(
    q: Float[Array, "B Y X H D"],
    k: Float[Array, "B Y X K D"],
    v: Float[Array, "B Y X K E"],
    *,
    height_rel: Float[Array, "R D"],
    width_rel: Float[Array, "S D"],
    scale: float | None = None,
    scale_positions: bool = False,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    edit: Edit | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Softmax attention between all places of a map, with relative logits (BoTNet, arXiv:2101.11605).

    Args:
      height_rel, width_rel: `2 Y - 1` and `2 X - 1` rows, by displacement key - query from the most negative one on.
      scale: of the products `q k^T`; `D ** -0.5` unless given.
      scale_positions: relative logits are scaled too.
      dropout, key, edit, implementation: as in `dense_attention`, with places as tokens.
      return_lse: return `(out, lse)` with the logsumexp `[B, Y, X, H]`, float32, natural.

    Raises:
      ValueError: arrays that do not belong together; tables for another map.
    """
    _check(q, k, v)
    scale = usable_scale(scale, q.shape[-1])
    bias = relative_logits(q, height_rel, width_rel, q.shape[1:3])
    tokens = (x.reshape(x.shape[0], math.prod(x.shape[1:3]), *x.shape[3:]) for x in (q, k, v))
    found = dense_attention(
        *tokens,
        bias=bias * scale if scale_positions else bias,
        scale=scale,
        dropout=dropout,
        key=key,
        edit=edit,
        return_lse=return_lse,
        implementation=implementation,
    )
    parts = [x.reshape(*q.shape[:3], *x.shape[2:]) for x in (found if return_lse else (found,))]
    return tuple(parts) if return_lse else parts[0]


def bottleneck_maps(
    q: Float[Array, "B Y X H D"],
    k: Float[Array, "B Y X K D"],
    lse: Float[Array, "B Y X H"],
    *,
    queries: Int[Array | np.ndarray, "Q 2"],
    height_rel: Float[Array, "R D"],
    width_rel: Float[Array, "S D"],
    scale: float | None = None,
    scale_positions: bool = False,
) -> Float[Array, "B Q H Y X"]:
    """What chosen queries look at, `exp(logit - lse)` in float32, from a run that keeps no map.

    Args:
      lse: what `bottleneck_attention(..., return_lse=True)` gave for q and k; other arguments are those of that call.
      queries: rows and columns of the queries, one pair for each.

    Raises:
      ValueError: as `bottleneck_attention`; a logsumexp of other queries; queries that are not on the map.
    """
    _check(q, k, k)
    check_lse(lse, q.shape[:-1])
    scale, places = usable_scale(scale, q.shape[-1]), check_places(queries, q.shape[1:3])
    chosen = q[:, *places]
    bias = relative_logits_of(chosen, places, height_rel, width_rel, q.shape[1:3])
    keys = k.reshape(k.shape[0], math.prod(k.shape[1:3]), *k.shape[3:])
    maps = dense_maps(chosen, keys, lse[:, *places], bias=bias * scale if scale_positions else bias, scale=scale)
    return jnp.swapaxes(maps, 1, 2).reshape(q.shape[0], len(places[0]), q.shape[3], *q.shape[1:3])


def _check(q: Any, k: Any, v: Any) -> None:
    check_maps(q, k, v)
    if k.shape[1:3] != q.shape[1:3]:
        raise ValueError(f"{shapes_of(q=q, k=k, v=v)}: k and v must have the map of q, {tuple(q.shape[1:3])}")
