"""How the GPU kernels cut a pattern into tiles: every decision about who sees whom is a table made on the host.

A program owns the *residents*, a tile of tokens of one dilation group, and streams past them the *visitors*, the
smallest box of tokens of that group that holds everything they look at. Forward and dQ: the residents are queries, the
visitors keys. dK and dV: the residents are keys, the visitors the queries that see them. Nothing else differs, so a
kernel knows no window, stride or causality; it reads intervals that `kernels.neighborhood.pattern` computed.

Both tile and box are counted off token by token and only then cut into powers of two: a 14 x 14 box is 196 visitors
in steps of 32, not four squares of 8 x 8.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Int

from kernels.neighborhood.pattern import Axis as PatternAxis
from kernels.neighborhood.pattern import Pattern


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a tiling.

    Attributes:
      extent: members of a tile; box: members of the largest box that a tile looks at.
      tiles: over all dilation groups.
      places: where the rows `(group, first member of the tile, first member of its box)` begin in the tables.
      starts, counts: where the intervals of all tokens begin in the tables, first member and number of members.
    """

    length: int
    dilation: int
    extent: int
    box: int
    tiles: int
    places: int
    starts: int
    counts: int


@dataclasses.dataclass(frozen=True, eq=False)
class Tiling:
    """Tiles of residents over a map, with the box of visitors of each. Made by `make_tiling`."""

    axes: tuple[Axis, ...]
    tables: Int[np.ndarray, " X"]

    @property
    def tiles(self) -> int:
        """Number of tiles, over all dilation groups."""
        return math.prod(axis.tiles for axis in self.axes)

    @property
    def rows(self) -> int:
        """Residents of a tile, filled up to a power of two that a matrix product can have."""
        return filled(math.prod(axis.extent for axis in self.axes))

    @property
    def box(self) -> int:
        """Visitors of a tile."""
        return math.prod(axis.box for axis in self.axes)

    def steps(self, width: int) -> int:
        """Number of times that `width` visitors come by."""
        return -(-self.box // width)


@functools.lru_cache(maxsize=1024)
def cut(axis: PatternAxis, extent: int, reverse: bool) -> Int[np.ndarray, "T 4"]:
    """Tiles of `extent` members of one axis: dilation group, first member, first and end of the box, as members."""
    tokens = np.arange(axis.length)
    group, member = tokens % axis.dilation, tokens // axis.dilation
    first, end = axis.reverse_interval(tokens) if reverse else axis.interval(tokens)
    order = np.lexsort((member, group))
    begins = np.flatnonzero(member[order] % extent == 0)
    return np.stack(
        [
            group[order][begins],
            member[order][begins],
            np.minimum.reduceat(first[order], begins),
            np.maximum.reduceat(end[order], begins),
        ],
        axis=1,
    )


@functools.lru_cache(maxsize=256)
def make_tiling(pattern: Pattern, extents: tuple[int, ...], *, reverse: bool = False) -> Tiling:
    """Tiles of `extents` members. `reverse`: the residents are keys and the visitors the queries that see them."""
    axes, tables, used = [], [], 0
    for axis, extent in zip(pattern.axes, extents, strict=True):
        tokens = np.arange(axis.length)
        first, end = axis.reverse_interval(tokens) if reverse else axis.interval(tokens)
        places = cut(axis, extent, reverse)
        box = int((places[:, 3] - places[:, 2]).max())
        parts = [places[:, :3].ravel(), first, end - first]
        begins = used + np.cumsum([0] + [part.size for part in parts])
        axes.append(Axis(axis.length, axis.dilation, extent, box, len(places), *map(int, begins[:3])))
        tables += parts
        used = int(begins[3])
    return Tiling(tuple(axes), np.concatenate(tables).astype(np.int32))


def filled(size: int) -> int:
    """The size to which `size` rows or lanes are filled up: a power of two that a matrix product can have."""
    return max(16, pl.next_power_of_2(size))
