"""Attention between channels: the channels of a group are what attends, their values at all places what is compared.

Channel group attention of DaViT (arXiv:2204.03645, section 3.3). Its cost is linear in the number of places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from attn.common.maps import check_lse, check_numbers
from attn.core.arguments import check_dtypes, check_rank, shapes_of, usable_scale
from attn.core.numerics import Edit
from attn.dense.api import dense_attention, dense_maps


def channel_attention(
    q: Float[Array, "B N G D"],
    k: Float[Array, "B N G D"],
    v: Float[Array, "B N G D"],
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    edit: Edit | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """`softmax(scale * q^T k) v^T` within each group of D channels, over all N places at once.

    Args:
      scale: `D ** -0.5` unless given, as in DaViT; Florence-2 has `N ** -0.5`.
      dropout: share of the probabilities set to zero (the rest scaled up); needs `key`.
      edit: may change `"logits"` and `"probs"` `[B, G, D, D]`, float32, of channels for channels.
      return_lse: return `(out, lse)` with the logsumexp of each channel `[B, D, G]`, float32, natural.
      implementation: `"xla"`, which is the reference; D is small, and no kernel is for it.

    Raises:
      ValueError: arrays of different shapes; as `dense_attention`.
    """
    _check(q, k, v)
    if implementation not in (None, "xla", "reference"):
        raise ValueError(f"unknown implementation {implementation!r} of channel_attention; allowed: xla, reference")
    # The same product as of tokens, with the axes of places and channels exchanged.
    found = dense_attention(
        *(jnp.swapaxes(x, 1, 3) for x in (q, k, v)),
        scale=usable_scale(scale, q.shape[-1]),
        dropout=dropout,
        key=key,
        edit=edit,
        return_lse=return_lse,
        implementation="xla",
    )
    heads, *lse = found if return_lse else (found,)
    out = jnp.swapaxes(heads, 1, 3)
    return (out, *lse) if return_lse else out


def channel_maps(
    q: Float[Array, "B N G D"],
    k: Float[Array, "B N G D"],
    lse: Float[Array, "B D G"],
    channels: Sequence[int] | Int[Array, " Q"],
    *,
    scale: float | None = None,
) -> Float[Array, "B G Q D"]:
    """What chosen channels of each group look at, `exp(logit - lse)` in float32, from a run that keeps no map.

    Args:
      lse: what `channel_attention(..., return_lse=True)` gave for q and k.
      channels: numbers of channels within their group.

    Raises:
      ValueError: as `channel_attention`; a logsumexp of others; a channel that there is not.
    """
    _check(q, k, k)
    check_lse(lse, (q.shape[0], q.shape[3], q.shape[2]))
    chosen = check_numbers("channel", channels, q.shape[3])
    queries, keys = (jnp.swapaxes(x, 1, 3) for x in (q, k))
    return dense_maps(queries[:, chosen], keys, lse[:, chosen], scale=usable_scale(scale, q.shape[-1]))


def _check(q: Any, k: Any, v: Any) -> None:
    shapes = shapes_of(q=q, k=k, v=v)
    check_rank((4,), "batch, places, groups, channels of a group", q=q, k=k, v=v)
    check_dtypes(q=q, k=k, v=v)
    if not q.shape == k.shape == v.shape:
        raise ValueError(f"{shapes}: k and v must have the shape of q")
