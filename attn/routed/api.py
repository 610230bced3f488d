"""Bi-level routing attention: regions of a map choose regions, and tokens attend to the tokens of the chosen ones.

BiFormer (arXiv:2303.08810, section 3.2). A map of `[Y, X]` places is cut into `regions = (rows, columns)` regions of
equal size. Means of queries and keys over regions say which regions a region is routed to (`route`); every query then
sees all keys of the regions that its own is routed to (`routed_attention`), which may not be its own.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray

from attn.common.maps import check_lse, check_places
from attn.core.arguments import check_dtypes, check_key, check_rank, check_rate, is_traced, shapes_of, usable_scale
from attn.core.numerics import Edit, product
from attn.core.operator import Implementation, Operator
from attn.core.shards import Layout
from attn.routed.routing import Regions, region_of_places, route, usable_regions
from attn.routed.xla import inside, plain
from kernels.neighborhood.pattern import PerAxis


@dataclasses.dataclass(frozen=True)
class Settings:
    """What of a call is no array."""

    regions: Regions
    scale: float

    @property
    def about(self) -> str:
        """As text."""
        return f"regions {self.regions}"


_HEADS: Layout = ("batch", None, None, "heads", None)

ROUTED = Operator(
    "routed_attention",
    (
        Implementation("tpu", "attn.routed.tpu", platforms=("tpu",)),
        Implementation("dense", "attn.routed.dense", platforms=("tpu",)),
        Implementation("xla", "attn.routed.xla", takes=("weights", "dropout", "look at the maps")),
        Implementation("reference", "attn.routed.xla", plain=True),
    ),
    layouts=lambda settings, q, k, v, indices: ([_HEADS] * 3 + [("batch", None, None)], [_HEADS, _HEADS[:-1]]),
    results=lambda settings, q, k, v, indices: (
        jax.ShapeDtypeStruct((*q.shape[:-1], v.shape[-1]), v.dtype),
        jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32),
    ),
    decisive=("regions",),
    gradients=(0, 1, 2),
    definition="xla",
)


def bilevel_routing_attention(
    q: Float[Array, "B Y X H D"],
    k: Float[Array, "B Y X H D"],
    v: Float[Array, "B Y X H E"],
    *,
    regions: PerAxis,
    topk: int,
    scale: float | None = None,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    edit: Edit | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Routes regions by the means of queries and keys, all heads together, and attends to the routed regions.

    Args:
      regions: rows and columns of regions, or a number for both; they divide the map.
      topk: regions that each region is routed to.
      scale: of the logits of tokens; `(H * D) ** -0.5` unless given: that of all heads together, as published.
      edit: may change `"routes"` `[B, R, topk]`, int32, and `"logits" "probs"`, as `routed_attention` says; an
        attribute `sites` says which, and if these are the routes alone a kernel may run.
      dropout, key, return_lse, implementation: see `routed_attention`.

    Raises:
      ValueError: as `route` and `routed_attention`.
    """
    _check_maps(q, k, v, regions)
    scale = (q.shape[-2] * q.shape[-1]) ** -0.5 if scale is None else scale
    indices = route(q, k, regions=regions, topk=topk)
    if edit is not None:
        indices = edit("routes", indices)
        if not hasattr(indices, "dtype"):
            raise ValueError(
                f"edit of 'routes' gave {indices!r:.80}; allowed: integers [batch, regions, routed regions]"
            )
    looks = edit is not None and getattr(edit, "sites", None) != ("routes",)
    return routed_attention(
        q,
        k,
        v,
        indices,
        regions=regions,
        scale=scale,
        dropout=dropout,
        key=key,
        edit=edit if looks else None,
        return_lse=return_lse,
        implementation=implementation,
    )


def routed_attention(
    q: Float[Array, "B Y X H D"],
    k: Float[Array, "B V U H D"],
    v: Float[Array, "B V U H E"],
    indices: Integer[Array, "B R K"],
    *,
    regions: PerAxis,
    scale: float,
    weights: Float[Array, "B R K"] | None = None,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    edit: Edit | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Softmax attention of every query to all keys of the regions that its own region is routed to.

    With r(i) the region of query i and J(r) the places of the regions `indices[r]`,

        out_i = sum_j softmax_j(scale * q_i . k_j) v_j   over j in J(r(i)).

    A region that is named twice counts twice. Softmax and sums are in float32 whatever the inputs are. Differentiable
    in q, k, v and weights, in reverse mode and once. Under `jax.checkpoint` the results are named `"attention_heads"`
    and `"attention_lse"`. Under a mesh: `attn/core/shards.py`; what runs where: `explain`.
    `implementation="reference"` has derivatives of every kind.

    Args:
      k, v: a map of the same regions, whose regions may have another number of places (pooled keys).
      indices: numbers of regions in row-major order, `[batch, regions, routed regions]`, the same for all heads. Traced
        ones outside the map count as the nearest inside.
      regions: rows and columns of regions, or a number for both; they divide both maps.
      weights: of the routed regions, which multiply their keys and values (soft routing).
      dropout: share of probabilities set to zero (the rest scaled up); needs `key`.
      edit: may change `"logits"` (scaled) and `"probs"` `[B, R, H, T, K * S]`, float32: T queries of a region and S
        keys of one. Weights, dropout and this take a path that keeps maps.
      return_lse: return `(out, lse)` with the logsumexp `[B, Y, X, H]`, float32, natural.
      implementation: `"tpu"`, `"dense"`, `"xla"` or `"reference"`; None: the best for the platform lowered for.

    Raises:
      ValueError: shapes that do not belong together; an unknown implementation, or one that refuses.
    """
    regions = _check(q, k, v, indices, weights, regions)
    check_key(key, check_rate("dropout", dropout))
    asked = {"weights": weights is not None, "dropout": bool(dropout), "look at the maps": edit is not None}
    options: dict[str, Any] = {"weights": weights, "dropout": dropout, "key": key, "edit": edit}
    found = ROUTED.run(
        (q, k, v, _numbers(indices, regions)),
        Settings(regions, usable_scale(scale, q.shape[-1])),
        plain=functools.partial(_plain, options),
        asked=[name for name, there in asked.items() if there],
        implementation=implementation,
        returned=1 + return_lse,
    )
    return found if return_lse else found[0]


def _plain(options: dict[str, Any], *inputs: Array, **settings: Any) -> tuple[Array, ...]:
    return plain(*inputs, **{**settings, **options})


def routed_maps(
    q: Float[Array, "B Y X H D"],
    k: Float[Array, "B V U H D"],
    lse: Float[Array, "B Y X H"],
    indices: Integer[Array, "B R K"],
    *,
    regions: PerAxis,
    scale: float,
    queries: Int[Array | np.ndarray, "Q 2"],
) -> Float[Array, "B Q H V U"]:
    """What chosen queries look at, `exp(logit - lse)` in float32, from a fused run that keeps no map.

    Args:
      lse: as `routed_attention(..., return_lse=True)` gives it; the other arguments are those of that call.
      queries: rows and columns of the queries, one pair for each.

    Returns:
      A map over all keys for each query, 0 in regions that its own is not routed to; one that is named twice has twice
      as much.

    Raises:
      ValueError: as `routed_attention`, and for queries that are not on the map.
    """
    used = _check(q, k, k, indices, None, regions)
    check_lse(lse, q.shape[:-1])
    indices, scale = inside(_numbers(indices, used), used[0] * used[1]), usable_scale(scale, q.shape[-1])
    rows, columns = check_places(queries, q.shape[1:3])
    own = (rows // (q.shape[1] // used[0])) * used[1] + columns // (q.shape[2] // used[1])
    routes = jax.nn.one_hot(indices[:, own], used[0] * used[1], dtype=jnp.float32).sum(axis=2)
    times = routes[..., region_of_places(k, used)].reshape(q.shape[0], len(own), 1, *k.shape[1:3])
    logits = scale * product("bqhd,byxhd->bqhyx", q[:, rows, columns].astype(jnp.float32), k.astype(jnp.float32))
    shares = jnp.exp(logits - lse[:, rows, columns][..., None, None])
    return jnp.where(times > 0, times * shares, 0)


def _check(q: Any, k: Any, v: Any, indices: Any, weights: Any, regions: PerAxis) -> Regions:
    """Rows and columns of regions."""
    used = _check_maps(q, k, v, regions)
    rows = (q.shape[0], used[0] * used[1])
    if indices.ndim != 3 or indices.shape[:2] != rows or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(
            f"indices {indices.dtype}{list(indices.shape)}: must be integers [batch, regions, routed regions], "
            f"which is [{rows[0]}, {rows[1]}, ...] here"
        )
    if indices.shape[2] == 0:
        raise ValueError(f"indices {list(indices.shape)}: must name at least one region for each")
    if weights is not None and (weights.shape != indices.shape or not jnp.issubdtype(weights.dtype, jnp.floating)):
        raise ValueError(
            f"weights {weights.dtype}{list(weights.shape)}: must be floating point of the shape of the indices, "
            f"{list(indices.shape)}"
        )
    return used


def _check_maps(q: Any, k: Any, v: Any, regions: PerAxis) -> Regions:
    """Rows and columns of regions."""
    shapes = shapes_of(q=q, k=k, v=v)
    check_rank((5,), "batch, rows, columns, heads, width", q=q, k=k, v=v)
    for array in (q, k, v):
        used = usable_regions(array.shape[1:3], regions)
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"{shapes}: v must have the batch, map and heads of k")
    if (q.shape[0], *q.shape[3:]) != (k.shape[0], *k.shape[3:]):
        raise ValueError(f"{shapes}: k must have the batch, heads and head dim of q")
    check_dtypes(q=q, k=k, v=v)
    return used


def _numbers(indices: Any, regions: Regions) -> Int[Array, "B R K"]:
    """Numbers of regions, int32; outside the map known ones are a ValueError. Traced ones are the nearest inside, which
    is up to each implementation: for kernels it would be a program of its own.
    """
    last = regions[0] * regions[1] - 1
    if not is_traced(indices):
        known = np.asarray(indices)
        outside = (known < 0) | (known > last)
        if outside.any():
            raise ValueError(f"indices: there is no region {known[outside][0]}; allowed: 0 to {last}")
    if jnp.iinfo(indices.dtype).max > jnp.iinfo(jnp.int32).max:
        indices = jnp.minimum(indices, last)
    return jnp.asarray(indices, jnp.int32)
