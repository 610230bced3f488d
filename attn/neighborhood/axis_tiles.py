"""Cutting a map into tiles of queries that share a halo of keys, for `attn.neighborhood.xla`: tables in NumPy.

A tile lies in one dilation group of every axis. Its halo is the interval from the first to the last key that any of its
queries sees, of one size for all tiles. Which keys of the halo a query sees depends on where the tile lies, but few
tiles differ in it: those at a border, those at another phase of the stride, and the rest. Each such class is a kind,
with one mask.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from kernels.neighborhood.pattern import Axis, Pattern

# Nanoseconds on one core of a Xeon with AVX-512, float32: a multiplication with its addition in a product of many rows,
# the softmax of one logit, the copy of one number of a key or value into its halo, and the handling of one tile.
PRODUCT, SOFTMAX, COPY, TILE = 0.07, 3.0, 0.4, 300.0
# A product of r rows runs at r / (r + ROWS) of the rate of one of many rows.
ROWS = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AxisTiles:
    """One axis of L tokens in C tiles of t queries with halos of h keys, the groups after each other.

    A pytree, so that one compiled program may serve all patterns with tables of the same shapes.
    """

    queries: Int[Array | np.ndarray, "C t"]  # tokens; places beyond the end of a group repeat its last
    is_query: Bool[Array | np.ndarray, "C t"]  # False for these repetitions
    keys: Int[Array | np.ndarray, "C h"]  # tokens
    kind: Int[Array | np.ndarray, " C"]
    seen: Bool[Array | np.ndarray, "kinds t h"]
    relative: Int[Array | np.ndarray, "kinds t h"]  # position in a bias; 0 where not seen
    tile: Int[Array | np.ndarray, " L"]  # of every token
    place: Int[Array | np.ndarray, " L"]  # of every token in its tile


@functools.lru_cache(maxsize=4096)
def axis_tiles(axis: Axis, tile: int) -> AxisTiles:
    """The tiles of one axis."""
    group, places = _places(axis, tile)
    members = np.minimum(places, axis.group_length(group) - 1)
    queries = group + axis.dilation * members
    first, end = axis.interval(queries)
    start = first.min(axis=1, keepdims=True)
    halo = np.arange((end.max(axis=1, keepdims=True) - start).max())
    keys = group + axis.dilation * np.minimum(start + halo, axis.group_length(group) - 1)

    # Counted from the start of the halo, tiles of a kind have the same intervals for the same queries.
    kinds, kind = np.unique(np.stack([first, end, members], axis=1) - start[:, None], axis=0, return_inverse=True)
    first, end, members = (part[..., None] for part in np.moveaxis(kinds, 1, 0))
    seen = (halo >= first) & (halo < end)
    relative = np.where(seen, halo - members + axis.window - 1, 0)

    is_query = places < axis.group_length(group)
    tiles, slots = np.nonzero(is_query)
    order = np.argsort(queries[tiles, slots])
    return AxisTiles(queries, is_query, keys, kind.reshape(-1), seen, relative, tiles[order], slots[order])


def _places(axis: Axis, tile: int) -> tuple[Int[np.ndarray, "C 1"], Int[np.ndarray, "C t"]]:
    """The group of each tile, and the members of its group that it covers, those behind the end included."""
    origins = np.arange(0, -(-axis.length // axis.dilation), tile)
    group = np.repeat(np.arange(axis.dilation), len(origins))[:, None]
    return group, np.tile(origins, axis.dilation)[:, None] + np.arange(tile)


@functools.lru_cache(maxsize=1024)
def choose_tile(pattern: Pattern, rows: int, width: int) -> tuple[int, ...]:
    """The tile that costs the least by the figures above: larger ones copy less, smaller ones compute less in vain.

    Args:
      rows: query heads for each key head.
      width: head dims of keys and values, together.
    """
    return min(itertools.product(*map(_candidates, pattern.axes)), key=lambda tile: _cost(pattern, tile, rows, width))


def _candidates(axis: Axis) -> list[int]:
    """Tile sizes worth a thought: whole runs of the stride, or powers of two and what cuts a group evenly."""
    longest = -(-axis.length // axis.dilation)
    limit = min(longest, max(2 * axis.window, 16))
    even = {-(-longest // parts) for parts in range(1, min(longest, 64) + 1)}
    sizes = even | {2**power for power in range(10)} | {axis.stride * runs for runs in range(1, 17)}
    return sorted(size for size in sizes if size <= limit)


def _cost(pattern: Pattern, tile: tuple[int, ...], rows: int, width: int) -> float:
    """Nanoseconds for one key head of one example, forward."""
    extents = [_extents(axis, size) for axis, size in zip(pattern.axes, tile, strict=True)]
    tiles, halo = math.prod(count for count, _ in extents), math.prod(keys for _, keys in extents)
    queries = rows * math.prod(tile)
    logit = PRODUCT * width * (1 + ROWS / queries) + SOFTMAX
    return tiles * (queries * halo * logit + COPY * halo * width + TILE)


@functools.lru_cache(maxsize=4096)
def _extents(axis: Axis, tile: int) -> tuple[int, int]:
    """Number of tiles and size of their halo."""
    group, places = _places(axis, tile)
    first, end = axis.interval(group + axis.dilation * np.minimum(places, axis.group_length(group) - 1))
    return len(group), int((end.max(axis=1) - first.min(axis=1)).max())
