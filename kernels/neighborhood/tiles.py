"""Tiles of queries, each with one box of keys that holds everything its queries see. Host side, in integers.

A map has its axes padded at the front to three, (z, y, x). A tile takes `tile[a]` consecutive members of a group along
each axis; along x it may take several groups, `residues`, since groups of a large dilation are smaller than a matrix
unit. Its keys are a box of `span[a]` members along each axis.

Groups are those of the dilation: what belongs together lies apart. Where strides cut x into blocks that do not see each
other, the blocks are the groups (those of each group of the dilation, if there is one): what belongs together lies side
by side. Then a tile takes whole blocks, which need not begin at a multiple of anything.

Within a tile queries are in the order (z, y, residue, x), keys in (z, y, residue, x) too.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kernels.neighborhood.pattern import Axis, Pattern

BLOCKED = -1e30
"""Added to a logit that its query does not see: finite, so that a row of nothing else gives no NaN."""


def three_axes(pattern: Pattern) -> tuple[Axis, Axis, Axis]:
    """The axes of a map as (z, y, x); those that it does not have are of one token."""
    z, y, x = (Axis(1, 1),) * (3 - len(pattern.axes)) + pattern.axes
    return z, y, x


def is_cut(pattern: Pattern) -> bool:
    """Whether the last axis is taken block by block.

    Its strides cut it into equal blocks that do not see each other, and tiles of 8 or 16 members would lie across their
    borders. Not on a map of one axis, which is cut into bands.
    """
    axis = pattern.axes[-1]
    cut = axis.stride == axis.window and axis.length % (axis.dilation * axis.window) == 0
    return cut and axis.window > 4 and axis.window % 8 > 0 and len(pattern.axes) > 1


def group_count(pattern: Pattern) -> int:
    """Groups of the last axis."""
    axis = pattern.axes[-1]
    return axis.length // axis.window if is_cut(pattern) else axis.dilation


def with_examples(pattern: Pattern, examples: int) -> Pattern:
    """The pattern of a map that has several examples side by side: token `i` of example `b` is `i * examples + b`.

    They are groups of the dilation, so that a tile may take several of them.
    """
    *others, x = pattern.axes
    longer = dataclasses.replace(x, length=examples * x.length, dilation=examples * x.dilation)
    return Pattern((*others, longer))


@dataclasses.dataclass(frozen=True)
class AxisTiles:
    """The tiles of one axis.

    Attributes:
      axis: the axis and its pattern.
      tile: members of a group in a tile.
      multiple: key boxes are rounded up to it.
      residues: groups in a tile.
      bands: the tiles of a group come in this many equal runs; there are more of them than needed where that takes it.
      by_block: the groups are blocks of neighbors (`is_cut`).
    """

    axis: Axis
    tile: int
    multiple: int = 1
    residues: int = 1
    bands: int = 1
    by_block: bool = False

    @property
    def step(self) -> int:
        """Tokens from one member of a group to the next."""
        return self.axis.dilation

    @property
    def apart(self) -> int:
        """Tokens from the first member of a group to that of the next group of a tile."""
        return self.axis.window if self.by_block and self.step == 1 else 1

    def group_start(self, group: Any) -> Any:
        """First token of a group."""
        return group // self.step * self.step * self.axis.window + group % self.step if self.by_block else group

    @property
    def group_count(self) -> int:
        """Number of groups."""
        return self.axis.length // self.axis.window if self.by_block else self.axis.dilation

    @property
    def groups(self) -> int:
        """Length of the longest group."""
        return -(-self.axis.length // self.group_count)

    @property
    def along(self) -> int:
        """Tiles along one group."""
        return -(-self.groups // (self.tile * self.bands)) * self.bands

    @property
    def count(self) -> int:
        """Number of tiles; the number within a group varies fastest."""
        return self.group_count // self.residues * self.along

    @functools.cached_property
    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """`[first, end)` by tile, residue and member of the tile; an empty interval for members that do not exist."""
        axis = self.axis
        group = np.arange(self.group_count)[:, None]
        member = np.arange(self.along * self.tile)[None]
        exists = member < (self.groups if self.by_block else axis.group_length(group))
        bounds = axis.interval(np.where(exists, self.group_start(group) + self.step * member, 0))
        # The axis counts members from its first token on, a block from its own.
        before = group // self.step * axis.window if self.by_block else 0
        first, end = (np.where(exists, bound - before, 0) for bound in bounds)
        shape = (self.group_count // self.residues, self.residues, self.along, self.tile)
        first, end = (bound.reshape(shape).swapaxes(1, 2) for bound in (first, end))
        return tuple(bound.reshape(self.count, self.residues, self.tile) for bound in (first, end))  # type: ignore

    @functools.cached_property
    def _first_key(self) -> np.ndarray:
        first, end = self._bounds
        return np.where(end > first, first, np.iinfo(first.dtype).max).min(axis=(1, 2))

    @functools.cached_property
    def span(self) -> int:
        """Members of a group in a box of keys."""
        widest = int((self._bounds[1].max(axis=(1, 2)) - self._first_key).max())
        return -(-widest // self.multiple) * self.multiple

    @functools.cached_property
    def key_start(self) -> np.ndarray:
        """First member in the box of each tile; moved back where the box would end behind the longest group."""
        return np.maximum(np.minimum(self._first_key, self.groups - self.span), 0)

    @functools.cached_property
    def query_start(self) -> np.ndarray:
        """First member of each tile."""
        return np.tile(np.arange(self.along) * self.tile, self.group_count // self.residues)

    @functools.cached_property
    def first_group(self) -> np.ndarray:
        """First group of each tile."""
        return np.repeat(np.arange(0, self.group_count, self.residues), self.along)

    @functools.cached_property
    def _classes(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct `[first, end)` relative to the box, `[class, 2, residue, member]`, and the class of each tile."""
        first, end = self._bounds
        relative = np.stack([first, end], axis=1) - self.key_start[:, None, None, None]
        relative = np.where((end > first)[:, None], relative, 0)
        return np.unique(relative, axis=0, return_inverse=True)

    @property
    def mask_class(self) -> np.ndarray:
        """For each tile, the row of `masks` that holds for it."""
        return self._classes[1].reshape(-1)

    @functools.cached_property
    def masks(self) -> np.ndarray:
        """`[class, residue, key, residue, query]`: True where the query sees the key along this axis."""
        first, end = self._classes[0][:, 0, None, None], self._classes[0][:, 1, None, None]
        key = np.arange(self.span)[None, None, :, None, None]
        same = np.eye(self.residues, dtype=bool)[None, :, None, :, None]
        return (key >= first) & (key < end) & same

    @property
    def offset(self) -> np.ndarray:
        """For each tile, the distance in members from its first query to its first key."""
        return self.key_start - self.query_start


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of a map."""

    axes: tuple[AxisTiles, AxisTiles, AxisTiles]

    @property
    def queries(self) -> int:
        """Queries in a tile."""
        return math.prod(axis.tile * axis.residues for axis in self.axes)

    @property
    def keys(self) -> int:
        """Keys in the box of a tile."""
        return math.prod(axis.span * axis.residues for axis in self.axes)

    @property
    def count(self) -> int:
        """Number of tiles."""
        return math.prod(axis.count for axis in self.axes)


def make_tiles(pattern: Pattern, tile: Sequence[int], *, residues: int = 1, bands: int = 1, multiple: int = 8) -> Tiles:
    """The tiles of a pattern.

    Args:
      tile: members along each axis of the map (as many as it has axes).
      residues: groups of the last axis in a tile; it divides the number of groups that the axis has.
      bands: runs of tiles along the first axis of the map.
      multiple: tiles and boxes have a multiple of this many members along the last axis.
    """
    axes = three_axes(pattern)
    missing = 3 - len(tile)
    members = (1,) * missing + tuple(tile)
    groups = group_count(pattern)
    if groups % residues or members[2] % multiple:
        raise ValueError(
            f"tile {tuple(tile)} with {residues} residues: the last extent must be a multiple of {multiple}, and "
            f"residues must divide the {groups} groups of the last axis"
        )
    z, y, x = (
        AxisTiles(
            axis,
            members[number],
            multiple=multiple if number == 2 else 1,
            residues=residues if number == 2 else 1,
            bands=bands if number == missing else 1,
            by_block=number == 2 and is_cut(pattern),
        )
        for number, axis in enumerate(axes)
    )
    return Tiles((z, y, x))
