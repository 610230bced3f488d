"""How a problem is laid out for the TPU kernels: blocks of heads, bands of the map, and the small tables they read.

The kernels take what a projection gives, `[B, Z, Y, X, H * D]`: heads side by side in the lanes. One step of the grid
works on one example, a block of heads, and a band of the map (all of it, where that fits the memory). Heads that share
128 lanes are told apart by setting the lanes of the others to zero in one operand of a product, so nothing is ever
moved across lanes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kernels.neighborhood.pattern import Pattern
from kernels.neighborhood.tiles import BLOCKED, AxisTiles, Tiles, make_tiles

LANES = 128
ALIGNMENT = 16
"""Rows that a block of a narrow type begins at a multiple of."""


@dataclasses.dataclass(frozen=True)
class AxisLayout:
    """Where the tiles of an axis find their tokens within the blocks of a band.

    Attributes:
      tiles: the tiles.
      aligned: blocks must begin at a multiple of `ALIGNMENT` tokens (the axis that lies in the sublanes).
    """

    tiles: AxisTiles
    aligned: bool

    @property
    def unit(self) -> int:
        """Blocks of a band begin at a multiple of this many tokens."""
        return ALIGNMENT if self.aligned else 1

    @property
    def can_band(self) -> bool:
        """Whether blocks of bands begin where they must, and none of them behind the map."""
        begins = self.queries % self.unit == 0 and not np.any(self.first_key % self.unit)
        return bool(begins) and self.queries * (self.tiles.bands - 1) < self.tiles.axis.length

    def _by_band(self, values: np.ndarray) -> np.ndarray:
        """Values by tile as `[band, tiles of the band]`."""
        bands = self.tiles.bands
        split = values.reshape(-1, bands, self.tiles.along // bands)
        return split.swapaxes(0, 1).reshape(bands, -1)

    @property
    def queries(self) -> int:
        """Tokens of a block of queries."""
        axis, bands = self.tiles.axis, self.tiles.bands
        return axis.length if bands == 1 else axis.dilation * self.tiles.tile * self.tiles.along // bands

    @functools.cached_property
    def _key_ends(self) -> tuple[np.ndarray, np.ndarray]:
        """First token and end of the keys of each band."""
        axis, tiles = self.tiles.axis, self.tiles
        start = axis.dilation * self._by_band(tiles.key_start).min(axis=1)
        end = axis.dilation * (self._by_band(tiles.key_start).max(axis=1) + tiles.span)
        start, end = start // self.unit * self.unit, -(-end // self.unit) * self.unit
        return start, np.minimum(end, axis.length)

    @functools.cached_property
    def keys(self) -> int:
        """Tokens of a block of keys."""
        start, end = self._key_ends
        return self.tiles.axis.length if self.tiles.bands == 1 else int((end - start).max())

    @property
    def first_key(self) -> np.ndarray:
        """For each band, the token that its block of keys begins with."""
        return np.minimum(self._key_ends[0], self.tiles.axis.length - self.keys)

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """`[band, tile, 4]`: first query and first key within the blocks, mask class, offset (see `offsets`)."""
        tiles, step = self.tiles, self.tiles.step
        band = np.arange(tiles.bands)[:, None]
        group = tiles.group_start(tiles.first_group)
        query = self._by_band(group + step * tiles.query_start) - band * self.queries
        key = self._by_band(group + step * tiles.key_start) - self.first_key[:, None]
        offset = np.searchsorted(offsets(tiles), tiles.offset)
        return np.stack([query, key, self._by_band(tiles.mask_class), self._by_band(offset)], axis=-1)

    @property
    def padded_queries(self) -> int:
        """Tokens that reading every tile touches, from the first one of the block on."""
        return max(self.queries, self._end(0, self.tiles.tile))

    @property
    def padded_keys(self) -> int:
        """Tokens that reading every box touches."""
        return max(self.keys, self._end(1, self.tiles.span))

    def _end(self, column: int, members: int) -> int:
        last = int(self.starts[..., column].max()) + self.tiles.apart * (self.tiles.residues - 1)
        return last + self.tiles.step * (members - 1) + 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """One problem for the kernels.

    Attributes:
      tiles: tiles of queries and their keys.
      heads: all heads.
      head_dim: lanes of a head, a multiple of 8.
      block_heads: heads in a block of lanes.
      extra: extra keys; the kernels see them padded to a multiple of 8, behind the keys of the box.
      examples: how many lie side by side along x (`with_examples`).
    """

    tiles: Tiles
    heads: int
    head_dim: int
    block_heads: int
    extra: int = 0
    examples: int = 1

    @functools.cached_property
    def layouts(self) -> tuple[AxisLayout, AxisLayout, AxisLayout]:
        """Of the axes z, y, x."""
        z, y, x = self.tiles.axes
        return AxisLayout(z, False), AxisLayout(y, False), AxisLayout(x, True)

    @property
    def bands(self) -> int:
        """Bands of the map."""
        return math.prod(axis.bands for axis in self.tiles.axes)

    @property
    def band_tiles(self) -> int:
        """Tiles of a band."""
        return self.tiles.count // self.bands

    @property
    def lanes(self) -> int:
        """Lanes of a block."""
        return self.block_heads * self.head_dim

    @property
    def blocks(self) -> int:
        """Number of blocks of lanes."""
        return self.heads // self.block_heads

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """Runs of at most 128 lanes, `[first, end)`, that make up a block."""
        return tuple((first, min(first + LANES, self.lanes)) for first in range(0, self.lanes, LANES))

    def head_parts(self, head: int) -> tuple[int, int]:
        """The parts `[first, end)` that hold a head."""
        return head * self.head_dim // LANES, -(-(head + 1) * self.head_dim // LANES)

    @property
    def together(self) -> list[tuple[tuple[int, int], list[int]]]:
        """Heads of a block by the parts that hold them."""
        found: dict[tuple[int, int], list[int]] = {}
        for head in range(self.block_heads):
            found.setdefault(self.head_parts(head), []).append(head)
        return list(found.items())

    @property
    def extra_rows(self) -> int:
        """Rows of the padded extra keys."""
        return -(-self.extra // 8) * 8

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """The `starts` of the axes z, y, x one after another, flat: what the kernels read as scalars."""
        return np.concatenate([layout.starts.ravel() for layout in self.layouts]).astype(np.int32)

    @property
    def starts_of_axis(self) -> tuple[int, int, int]:
        """Where each axis begins in `starts`."""
        z, y, _ = (layout.starts.size for layout in self.layouts)
        return 0, z, z + y

    @functools.cached_property
    def masks(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What to add to logits for each axis, `[class, keys along it, queries of a tile]` float32; they are summed."""
        return tuple(_additive(self.tiles, number) for number in range(3))  # type: ignore[return-value]

    def existing_queries(self, band: Any) -> tuple[Any, Any, Any]:
        """Along z, y, x: how many tokens of a band's block of queries exist; None where all do in every band."""
        return tuple(  # type: ignore[return-value]
            layout.tiles.axis.length - band * layout.queries
            if layout.queries * layout.tiles.bands > layout.tiles.axis.length
            else None
            for layout in self.layouts
        )

    @functools.cached_property
    def is_uniform(self) -> bool:
        """Whether all tiles have the same masks and the same distances to their boxes."""
        return all(len(masks) == 1 for masks in self.masks) and all(len(offsets(axis)) == 1 for axis in self.tiles.axes)

    @property
    def recomputes(self) -> bool:
        """Whether the backward kernel computes the logsumexp again.

        Where tiles have queries that do not exist, XLA has to clear theirs, which takes longer for small tiles.
        """
        exact = all(axis.axis.length == axis.group_count * axis.along * axis.tile for axis in self.tiles.axes)
        return self.is_uniform and not exact and not self.extra

    @property
    def is_direct(self) -> bool:
        """Whether tiles of queries lie whole and aligned in the map, so that they need no unpacked copy."""
        whole = all(layout.padded_queries == layout.queries for layout in self.layouts)
        x = self.tiles.axes[2]
        fits = all(axis.axis.length == axis.axis.dilation * axis.tile * axis.along for axis in self.tiles.axes)
        return whole and fits and x.group_count == 1 and x.tile % ALIGNMENT == 0


def make_plan(
    pattern: Pattern,
    heads: int,
    head_dim: int,
    *,
    tile: Sequence[int],
    residues: int = 1,
    bands: int = 1,
    block_heads: int | None = None,
    extra: int = 0,
    examples: int = 1,
) -> Plan:
    """The plan with these tiles, see `make_tiles`. `block_heads`: one of `block_sizes`, all heads unless given."""
    tiles = make_tiles(pattern, tile, residues=residues, bands=bands)
    return Plan(tiles, heads, head_dim, heads if block_heads is None else block_heads, extra, examples)


def block_sizes(heads: int, head_dim: int) -> list[int]:
    """Numbers of heads that may make a block, largest first: whole runs of 128 lanes, or all heads."""
    filling = LANES // math.gcd(LANES, head_dim)
    return [n for n in range(heads, 0, -1) if heads % n == 0 and (n == heads or n % filling == 0)]


def offsets(axis: AxisTiles) -> np.ndarray:
    """Distances in members from the first query to the first key of a tile: what the bias of a tile depends on.

    Along x one entry for each distance that occurs; along z and y all from the smallest to the largest, since there the
    bias of a tile is a window into that of a larger one.
    """
    found = np.unique(axis.offset)
    return found if axis.multiple > 1 else np.arange(found[0], found[-1] + 1)


def _additive(tiles: Tiles, number: int) -> np.ndarray:
    axis = tiles.axes[number]
    masks = axis.masks.reshape(-1, axis.residues * axis.span, axis.residues * axis.tile)
    counts = [one.residues * one.tile for one in tiles.axes]
    shape = [*masks.shape[:2], 1, 1, 1]
    shape[2 + number] = counts[number]
    spread = np.broadcast_to(masks.reshape(shape), (*masks.shape[:2], *counts))
    return np.where(spread, 0.0, BLOCKED).astype(np.float32).reshape(*masks.shape[:2], tiles.queries)
