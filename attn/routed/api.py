"""Bi-level routing attention: regions of a map choose regions, and tokens attend to the tokens of the chosen ones.

BiFormer (arXiv:2303.08810, section 3.2). A map of `[Y, X]` places is cut into `regions = (rows, columns)` regions of
equal size. Means of queries and keys over regions say which regions a region is routed to (`route`); every query then
sees all keys of the regions that its own is routed to (`routed_attention`), which may not be its own.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from attn.core.operator import Implementation, Operator, checked, decide, dispatch
from attn.core.shards import Layout, on_shards
from attn.core.vmap import foldable
from attn.dense.api import Hook
from attn.neighborhood.arguments import DTYPES
from attn.routed.xla import Regions, unfused
from kernels.neighborhood.pattern import PerAxis, per_axis

ROUTED = Operator(
    "routed_attention",
    (
        Implementation("tpu", "kernels.routed.tpu", platforms=("tpu",)),
        Implementation("dense", "attn.routed.dense", platforms=("tpu",)),
        Implementation("xla", "attn.routed.xla"),
    ),
)


def bilevel_routing_attention(
    q: Float[Array, "B Y X H D"],
    k: Float[Array, "B Y X H D"],
    v: Float[Array, "B Y X H E"],
    *,
    regions: PerAxis,
    topk: int,
    scale: float | None = None,
    hook: Hook | None = None,
    layer: Any = None,
    implementation: str | None = None,
) -> Float[Array, "B Y X H E"]:
    """Routes regions by the means of queries and keys, all heads together, and attends to the routed regions.

    Args:
      regions: rows and columns of regions, or a number for both; they divide the map.
      topk: regions that each region is routed to.
      scale: of the logits of tokens; `(H * D) ** -0.5` unless given: that of all heads together, as published.
      hook: may edit `"q" "k" "v"`, the arguments; `"routes"` `[B, R, topk]`, int32; `"logits" "probs"`, as
        `routed_attention` says; and `"heads"`, the result.
      layer, implementation: see `routed_attention`.

    Raises:
      ValueError: as `route` and `routed_attention`.
    """
    edit = (lambda site, value: hook(site, value, layer)) if hook else (lambda site, value: value)
    q, k, v = edit("q", q), edit("k", k), edit("v", v)
    scale = (q.shape[-2] * q.shape[-1]) ** -0.5 if scale is None else scale
    indices = edit("routes", route(q, k, regions=regions, topk=topk))
    heads = routed_attention(
        q, k, v, indices, regions=regions, scale=scale, hook=hook, layer=layer, implementation=implementation
    )
    return edit("heads", heads)


# --- routing ----------------------------------------------------------------------------------------------------------


def route(
    q: Float[Array, "B Y X *F"],
    k: Float[Array, "B Y X *F"],
    *,
    regions: PerAxis,
    topk: int,
    scale: float = 1.0,
) -> Int[Array, "B R K"]:
    """The regions that each region is routed to, by number in row-major order, best first.

    In float32, without a gradient. Of equal affinities the region with the smaller number is taken.

    Args:
      scale: of the affinities; only its sign matters here.

    Raises:
      ValueError: as `region_means` and `top_regions`.
    """
    q, k = jax.lax.stop_gradient((q, k))
    return top_regions(affinity(region_means(q, regions), region_means(k, regions), scale), topk)[1]


def region_means(
    x: Float[Array, "B Y X *F"], regions: PerAxis, *, shape: Sequence[int] | None = None
) -> Float[Array, "B R C"]:
    """Mean of each region over its places, all features in one axis, float32.

    Args:
      shape: rows and columns of the map that are counted; what lies behind is padding with zeros.

    Raises:
      ValueError: the regions do not divide the map.
    """
    regions = usable_regions(x.shape[1:3], regions)
    batch, rows, columns = x.shape[:3]
    split = (batch, regions[0], rows // regions[0], regions[1], columns // regions[1], -1)
    sums = x.astype(jnp.float32).reshape(split).sum(axis=(2, 4))
    filled = [
        np.clip(side - np.arange(count) * (whole // count), 0, whole // count)
        for side, whole, count in zip(shape or (rows, columns), (rows, columns), regions, strict=True)
    ]
    means = sums / np.maximum(filled[0][:, None] * filled[1], 1).astype(np.float32)[..., None]
    return means.reshape(batch, regions[0] * regions[1], -1)


def affinity(queries: Float[Array, "B R C"], keys: Float[Array, "B R C"], scale: float = 1.0) -> Float[Array, "B R R"]:
    """How much a region (row) has to do with another one (column), in full float32 on every platform."""
    return jnp.einsum("brc,bsc->brs", scale * queries, keys, precision=jax.lax.Precision.HIGHEST)


def top_regions(affinities: Float[Array, "B R R"], topk: int) -> tuple[Float[Array, "B R K"], Int[Array, "B R K"]]:
    """The largest affinities of each region, and whose they are.

    Raises:
      ValueError: there are not so many regions.
    """
    count = affinities.shape[-1]
    if isinstance(topk, bool) or not isinstance(topk, int) or not 1 <= topk <= count:
        raise ValueError(f"topk={topk!r}: there are {count} regions; allowed: 1 to {count}")
    return jax.lax.top_k(affinities, topk)


def usable_regions(shape: Sequence[int], regions: PerAxis) -> Regions:
    """Rows and columns of regions; ValueError if they do not divide the map."""
    rows, columns = per_axis("regions", regions, 2, 1)
    if any(side % count or side == 0 for side, count in zip(shape, (rows, columns), strict=True)):
        allowed = " and ".join(", ".join(str(n) for n in range(1, side + 1) if side % n == 0) for side in shape)
        raise ValueError(f"regions {(rows, columns)} do not divide a map of {tuple(shape)}; allowed: {allowed}")
    return rows, columns


# --- attention to the routed regions ----------------------------------------------------------------------------------


def routed_attention(
    q: Float[Array, "B Y X H D"],
    k: Float[Array, "B V U H D"],
    v: Float[Array, "B V U H E"],
    indices: Int[Array, "B R K"],
    *,
    regions: PerAxis,
    scale: float,
    weights: Float[Array, "B R K"] | None = None,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    hook: Hook | None = None,
    layer: Any = None,
    implementation: str | None = None,
) -> Float[Array, "B Y X H E"]:
    """Softmax attention of every query to all keys of the regions that its own region is routed to.

    With r(i) the region of query i and J(r) the places of the regions `indices[r]`,

        out_i = sum_j softmax_j(scale * q_i . k_j) v_j   over j in J(r(i)).

    A region that is named twice counts twice. Softmax and sums are in float32 whatever the inputs are. Differentiable
    in q, k, v and weights, in reverse mode and once. Under `jax.checkpoint` the results are named `"attention_heads"`
    and `"attention_lse"`. Under a mesh: `attn/core/shards.py`; what runs where: `explain`.

    Args:
      k, v: a map of the same regions, whose regions may have another number of places (pooled keys).
      indices: numbers of regions in row-major order, `[batch, regions, routed regions]`, the same for all heads.
      regions: rows and columns of regions, or a number for both; they divide both maps.
      weights: of the routed regions, which multiply their keys and values (soft routing).
      dropout: share of probabilities set to zero (the rest scaled up); needs `key`.
      hook: may edit `"logits" "probs"` `[B * R, H, T, K * S]`: T queries of a region and S keys of one, regions as a
        batch. Weights, dropout and hooks take an unfused path.
      layer: handed to the hook.
      implementation: `"tpu"`, `"dense"` or `"xla"`; None: the best for the platform lowered for.

    Raises:
      ValueError: shapes that do not belong together; an unknown implementation, or one that refuses.
    """
    regions = _check(q, k, v, indices, weights, regions)
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise ValueError(f"scale={scale!r}; allowed: a number (not a traced one)")
    asked = {"weights": weights is not None, "dropout": bool(dropout), "hook": hook is not None}
    beside = tuple(name for name in asked if asked[name])
    call = _Call(regions, float(scale), implementation)
    if not beside:
        return _attention(call, q, k, v, indices)
    about = f"{call.about} with {', '.join(beside)}"
    choices = decide(ROUTED, (q, k, v, indices), call.options(beside), about=about, forced=implementation)
    heads = unfused(
        checked(ROUTED, (q, k, v, indices), choices, about=about),
        k,
        v,
        indices,
        regions=regions,
        scale=call.scale,
        weights=weights,
        dropout=dropout,
        key=key,
        edit=(lambda site, value: hook(site, value, layer)) if hook else (lambda site, value: value),
    )
    return checkpoint_name(heads, "attention_heads")


@dataclasses.dataclass(frozen=True)
class _Call:
    """What of a call is no array."""

    regions: Regions
    scale: float
    implementation: str | None

    @property
    def about(self) -> str:
        return f"regions {self.regions}"

    def options(self, beside: tuple[str, ...] = ()) -> dict[str, Any]:
        """What the choice of an implementation depends on."""
        return {"regions": self.regions, "beside": beside}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: _Call, *inputs: Array) -> Array:
    return _attention_forward(call, *inputs)[0]


def _attention_forward(call: _Call, *inputs: Array) -> tuple[Array, Any]:
    out, lse = _step(call, "forward")(*inputs)
    out, lse = checkpoint_name(out, "attention_heads"), checkpoint_name(lse, "attention_lse")
    return out, (inputs, out, lse)


def _attention_backward(call: _Call, kept: Any, d_out: Array) -> tuple[Array | None, ...]:
    inputs, out, lse = kept
    return *_step(call, "backward")(*inputs, out, lse, d_out), None


_attention.defvjp(_attention_forward, _attention_backward)


@functools.lru_cache(maxsize=1024)
def _step(call: _Call, step: str) -> Any:
    """`forward` or `backward` of the implementation that is chosen, over a mesh, and under vmap."""
    heads: Layout = ("batch", None, None, "heads", None)
    lse: Layout = ("batch", None, None, "heads")
    into: list[Layout | None] = [heads, heads, heads, ("batch", None, None), heads, lse, heads]

    def layouts(*arguments: Any) -> tuple[list[Layout | None], list[Layout | None]]:
        return into[: len(arguments)], [heads, lse] if step == "forward" else [heads] * 3

    def on_one_device(*arguments: Any) -> tuple[Array, ...]:
        return dispatch(
            ROUTED,
            step,
            arguments[:4],
            arguments[4:],
            options=call.options(),
            settings={"regions": call.regions, "scale": call.scale},
            about=call.about,
            forced=call.implementation,
        )

    def everywhere(*arguments: Any) -> tuple[Array, ...]:
        return on_shards(on_one_device, arguments, *layouts(*arguments))

    return foldable(everywhere, layouts, keys=1)


def _check(q: Any, k: Any, v: Any, indices: Any, weights: Any, regions: PerAxis) -> Regions:
    """Rows and columns of regions."""
    arrays = {"q": q, "k": k, "v": v}
    shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in arrays.items())
    for name, array in arrays.items():
        if array.ndim != 5:
            raise ValueError(f"{shapes}: {name} has {array.ndim} axes; allowed: [batch, rows, columns, heads, width]")
        used = usable_regions(array.shape[1:3], regions)
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"{shapes}: v must have the batch, map and heads of k")
    if (q.shape[0], *q.shape[3:]) != (k.shape[0], *k.shape[3:]):
        raise ValueError(f"{shapes}: k must have the batch, heads and head dim of q")
    dtypes = {name: str(array.dtype) for name, array in arrays.items()}
    if len(set(dtypes.values())) > 1 or dtypes["q"] not in DTYPES:
        given = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise ValueError(f"dtypes {given}; allowed: one for all of them, of {', '.join(DTYPES)}")
    rows = (q.shape[0], used[0] * used[1])
    if indices.ndim != 3 or indices.shape[:2] != rows or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(
            f"indices {indices.dtype}{list(indices.shape)}: must be integers [batch, regions, routed regions], "
            f"which is [{rows[0]}, {rows[1]}, ...] here"
        )
    if weights is not None and weights.shape != indices.shape:
        raise ValueError(f"weights {list(weights.shape)}: must have the shape of the indices, {list(indices.shape)}")
    return used
