"""Softmax attention between all pairs of tokens (Vaswani et al. 2017, arXiv:1706.03762, eq. 1)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from attn.common.maps import check_lse
from attn.core.arguments import (
    check_bias,
    check_dtypes,
    check_heads,
    check_key,
    check_rank,
    check_rate,
    number_or_array,
    shapes_of,
)
from attn.core.masks import Mask, as_mask
from attn.core.numerics import Edit
from attn.core.operator import Implementation, Operator
from attn.core.shards import Layout
from attn.dense.xla import plain, scaled_logits


@dataclasses.dataclass(frozen=True)
class Settings:
    """What of a call is no array."""

    scale: float
    with_lse: bool
    about = ""


_HEADS: Layout = ("batch", None, "heads", None)
_LSE: Layout = ("batch", None, "heads")


def _layouts(settings: Settings, *inputs: Any) -> tuple[list[Layout | None], list[Layout | None]]:
    results: list[Layout | None] = [_HEADS, _LSE]
    return [_HEADS] * 3, results[: 1 + settings.with_lse]


def _results(settings: Settings, q: Any, k: Any, v: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    out = jax.ShapeDtypeStruct((*q.shape[:-1], v.shape[-1]), v.dtype)
    return (out, jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32))[: 1 + settings.with_lse]


DENSE = Operator(
    "dense_attention",
    (
        Implementation("splash", "attn.dense.splash", platforms=("tpu",)),
        Implementation("tpu", "kernels.dense.tpu", platforms=("tpu",)),
        Implementation("cudnn", "attn.dense.cudnn", platforms=("cuda",)),
        Implementation("xla", "attn.dense.xla", plain=True),
    ),
    layouts=_layouts,
    results=_results,
    decisive=("with_lse",),
    keeps_results=False,
    keeps_maps=True,
)


def dense_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M K D"],
    v: Float[Array, "B M K E"],
    *,
    mask: Mask | Bool[Array, "*S"] | None = None,
    bias: Float[Array, "#B #H #N #M"] | None = None,
    scale: float | Array | None = None,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    edit: Edit | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """`softmax(scale * q k^T + bias) v`, every head on its own; query head h reads key head `h // (H // K)`.

    What runs where, `attn.explain` says. Where a kernel may run (on any platform) the map is not kept for the backward
    pass, and there is reverse-mode differentiation only, once; `implementation="reference"` has neither limit.

    Args:
      mask: where a query may look (`attn.Mask`), or a boolean array `[N, M]` or `[B, H, N, M]`, axes of 1 repeated. A
        query with nothing to look at gets zeros.
      bias: added to the scaled logits.
      scale: `D ** -0.5` unless given.
      dropout: share of probabilities set to zero (the rest scaled up); needs `key`.
      edit: may change the `"logits"` (scaled, after bias and mask) and `"probs"` `[B, H, N, M]`, float32; it takes the
        path that has them on every platform.
      return_lse: return `(out, lse)` with the logsumexp of the logits `[B, N, H]`, float32, natural.
      implementation: `"tpu"`, a kernel for up to 1024 tokens, `"splash"` (TPU) for more of them, `"cudnn"` (NVIDIA) or
        `"xla"`, which is the reference; None: the best for the platform lowered for.

    The softmax runs in float32 whatever the inputs are; the result has the dtype of `v`.

    Raises:
      ValueError: arrays that do not belong together; a mask that is no boolean array; an unknown implementation, or
        one that refuses.
    """
    allowed = _checked(q, k, v, mask, bias)
    check_key(key, check_rate("dropout", dropout))
    number, array = number_or_array(scale, q.shape[-1])
    asked = {
        "mask": mask is not None,
        "bias": bias is not None,
        "dropout": bool(dropout),
        "look at the maps": edit is not None,
        "scale that is an array": array is not None,
    }
    options: dict[str, Any] = {"mask": allowed, "bias": bias, "dropout": dropout, "key": key, "edit": edit}
    if array is not None:
        options["scale"] = array
    found = DENSE.run(
        (q, k, v),
        Settings(number, return_lse),
        plain=functools.partial(_plain, options),
        asked=[name for name, there in asked.items() if there],
        implementation=implementation,
        returned=1 + return_lse,
    )
    return found if return_lse else found[0]


def _plain(options: dict[str, Any], *inputs: Array, **settings: Any) -> tuple[Array, ...]:
    return plain(*inputs, **{**settings, **options})


def dense_maps(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M K D"],
    lse: Float[Array, "B N H"],
    *,
    mask: Mask | Bool[Array, "*S"] | None = None,
    bias: Float[Array, "#B #H #N #M"] | None = None,
    scale: float | Array | None = None,
) -> Float[Array, "B H N M"]:
    """What queries look at, `exp(logit - lse)` in float32, from a fused run that keeps no map.

    Args:
      q, lse: of chosen queries: rows of what `dense_attention(..., return_lse=True)` was given and gave.
      mask, bias, scale: as in that call, for these queries.

    Raises:
      ValueError: as `dense_attention`, and for a logsumexp of other queries.
    """
    allowed = _checked(q, k, k, mask, bias)
    check_lse(lse, q.shape[:-1])
    number, array = number_or_array(scale, q.shape[-1])
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    logits = scaled_logits(q, k, scale=number if array is None else array, mask=allowed, bias=bias)
    maps = jnp.exp(logits - jnp.swapaxes(lse, 1, 2)[..., None])
    return maps if allowed is None else jnp.where(allowed, maps, 0)


def _checked(q: Any, k: Any, v: Any, mask: Any, bias: Any) -> Bool[Array, "#B #H #N M"] | None:
    """The mask over all pairs; ValueError for arrays that do not belong together."""
    shapes = shapes_of(q=q, k=k, v=v)
    check_rank((4,), "batch, tokens, heads, head dim", q=q, k=k, v=v)
    check_dtypes(q=q, k=k, v=v)
    if k.shape[0] != q.shape[0] or v.shape[:2] != k.shape[:2]:
        raise ValueError(f"{shapes}: k and v must have the batch of q, {q.shape[0]}, and one number of tokens")
    check_heads(q, k, v, shapes)
    sizes = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if bias is not None:
        check_bias(bias, sizes, "[batch, heads, queries, keys]")
    return None if mask is None else as_mask(mask).dense(*sizes)
