"""Routing of regions: means of queries and keys over regions say which regions a region has to do with.

BiFormer (arXiv:2303.08810, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels.neighborhood.pattern import PerAxis, per_axis

Regions = tuple[int, int]
"""Rows and columns of regions."""


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
    features = math.prod(x.shape[3:])
    split = (batch, regions[0], rows // regions[0], regions[1], columns // regions[1], features)
    sums = x.astype(jnp.float32).reshape(split).sum(axis=(2, 4))
    filled = [
        np.clip(side - np.arange(count) * (whole // count), 0, whole // count)
        for side, whole, count in zip(shape or (rows, columns), (rows, columns), regions, strict=True)
    ]
    means = sums / np.maximum(filled[0][:, None] * filled[1], 1).astype(np.float32)[..., None]
    return means.reshape(batch, regions[0] * regions[1], features)


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
    values, indices = jax.lax.top_k(affinities, topk)
    return values, indices


def usable_regions(shape: Sequence[int], regions: PerAxis) -> Regions:
    """Rows and columns of regions; ValueError if they do not divide the map."""
    rows, columns = per_axis("regions", regions, 2, 1)
    if any(side % count or side == 0 for side, count in zip(shape, (rows, columns), strict=True)):
        allowed = " and ".join(", ".join(str(n) for n in range(1, side + 1) if side % n == 0) for side in shape)
        raise ValueError(f"regions {(rows, columns)} do not divide a map of {tuple(shape)}; allowed: {allowed}")
    return rows, columns


def region_of_places(x: Any, regions: Regions) -> Int[np.ndarray, " N"]:
    """The number of the region of each place of a map `[B, Y, X, ...]`, both in row-major order."""
    rows, columns = (np.arange(side) // (side // count) for side, count in zip(x.shape[1:3], regions, strict=True))
    return (rows[:, None] * regions[1] + columns).reshape(-1)
