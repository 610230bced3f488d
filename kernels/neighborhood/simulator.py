"""What a tiling of neighborhood attention computes, of which how much is useful, and what it can gain over dense.

Tiles of queries are runs of members of one dilation group along each axis. Keys come in one of two ways:

* **aligned**: each group is cut into tiles of keys once and for all, and a tile of queries takes every tile of keys in
  which one of its queries sees a member. That is what kernels made from dense attention do (Generalized Neighborhood
  Attention, arXiv:2504.16922).
* **free**: a tile of queries takes one box of keys that begins where its first window begins. The box has one size for
  all tiles. That is what the kernels here do.

Only integers, and only from `pattern`: the union of the windows of neighboring queries is an interval along each axis,
and over several axes a product of intervals.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from kernels.neighborhood.pattern import Axis, Pattern


@dataclasses.dataclass(frozen=True)
class Simulation:
    """What a tiling computes, for one head of one example.

    Attributes:
      query_tile: members of a tile of queries along each axis; kv_tile: of a tile of keys, or of the one box of keys.
      is_aligned: which of the two ways to take keys.
      tiles: tiles of queries; visited: tiles of keys that they take, all together.
      useful: pairs of a query and a key that the pattern has; dense: pairs of dense attention.
    """

    query_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    is_aligned: bool
    tiles: int
    visited: int
    useful: int
    dense: int

    @property
    def computed(self) -> int:
        """Pairs that are computed, padding of incomplete tiles included."""
        return self.visited * math.prod(self.query_tile) * math.prod(self.kv_tile)

    @property
    def efficiency(self) -> float:
        """Useful over computed pairs, and so useful over computed FLOPs."""
        return self.useful / self.computed

    @property
    def gain(self) -> float:
        """How many times fewer FLOPs than dense attention: the most that can be gained over it at the same speed."""
        return self.dense / self.computed

    @property
    def gain_of_flops(self) -> float:
        """The same for a tiling that computes nothing in vain."""
        return self.dense / self.useful


def simulate(
    pattern: Pattern, query_tile: Sequence[int], kv_tile: Sequence[int] | None = None, *, multiple: int = 1
) -> Simulation:
    """Counts what a tiling computes.

    Args:
      query_tile: members along each axis.
      kv_tile: the same of aligned tiles of keys; None: free boxes.
      multiple: free boxes are rounded up to it along the last axis.

    Raises:
      ValueError: a tile has another number of axes than the map, or an extent below 1.
    """
    for name, tile in (("query_tile", query_tile), ("kv_tile", kv_tile)):
        if tile is not None and (len(tile) != len(pattern.axes) or min(tile) < 1):
            raise ValueError(f"{name}={tuple(tile)}; it needs {len(pattern.axes)} extents of at least 1")
    unions = [union(axis, extent) for axis, extent in zip(pattern.axes, query_tile, strict=True)]
    tiles = math.prod(len(first) for first, _ in unions)
    if kv_tile is None:
        keys = [int((end - first).max()) for first, end in unions]
        keys[-1] = -(-keys[-1] // multiple) * multiple
        visited = tiles
    else:
        keys = list(kv_tile)
        visited = math.prod(
            int((-(-end // extent) - first // extent).sum()) for (first, end), extent in zip(unions, keys, strict=True)
        )
    return Simulation(
        query_tile=tuple(query_tile),
        kv_tile=tuple(keys),
        is_aligned=kv_tile is not None,
        tiles=tiles,
        visited=visited,
        useful=pattern.pairs,
        dense=pattern.tokens**2,
    )


def union(axis: Axis, extent: int, *, of_all: bool = False) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
    """`[first, end)` of the members that some query (`of_all`: every query) of a tile sees, by tile of each group."""
    least, most = (np.maximum, np.minimum) if of_all else (np.minimum, np.maximum)
    firsts, ends = [], []
    for group in range(axis.dilation):
        length = int(axis.group_length(group))
        first, end = axis.interval(group + axis.dilation * np.arange(length))
        begins = np.arange(0, length, extent)
        firsts.append(least.reduceat(first, begins))
        ends.append(most.reduceat(end, begins))
    return np.concatenate(firsts), np.concatenate(ends)


def sharing_stride(pattern: Pattern, query_tile: Sequence[int]) -> tuple[int | None, ...]:
    """For each axis the smallest stride with which all queries of a tile see the same keys, None if there is none.

    A free box is then a window and nothing in it is computed in vain, where the tiles fill the map.
    """

    def shares(axis: Axis, extent: int) -> bool:
        bounds = zip(union(axis, extent), union(axis, extent, of_all=True), strict=True)
        return all(np.array_equal(some, of_all) for some, of_all in bounds)

    return tuple(
        _smallest(axis, functools.partial(shares, extent=extent))
        for axis, extent in zip(pattern.axes, query_tile, strict=True)
    )


def perfect_stride(pattern: Pattern, query_tile: Sequence[int], kv_tile: Sequence[int]) -> tuple[int | None, ...]:
    """For each axis the smallest stride with which aligned tiles compute nothing in vain, None if there is none."""

    def is_perfect(axis: Axis, extent: int, keys: int) -> bool:
        simulation = simulate(Pattern((axis,)), (extent,), (keys,))
        return simulation.computed == simulation.useful

    return tuple(
        _smallest(axis, functools.partial(is_perfect, extent=extent, keys=keys))
        for axis, extent, keys in zip(pattern.axes, query_tile, kv_tile, strict=True)
    )


def _smallest(axis: Axis, holds: Callable[[Axis], bool]) -> int | None:
    strides = range(1, axis.window + 1)
    return next((stride for stride in strides if holds(dataclasses.replace(axis, stride=stride))), None)
