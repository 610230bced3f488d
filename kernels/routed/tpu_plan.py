"""How a problem of routed attention is laid out for the TPU kernels.

The kernels take what a projection gives, `[B, Y, X, H * D]`: heads side by side in the lanes. A step of the grid works
on one example with all its heads. On the chip the map is sorted by region, `[region, place, lanes]`, a part for every
128 lanes, so that a routed region is one read at an index that is known only when the kernel runs.

A *block* is what one product of keys and queries has: the queries of a few regions, once for each head of a part, side
by side in the lanes of the logits `[keys, queries]`. A *pass* of the loop does several blocks, so that one fills the
waits of another.
"""

from __future__ import annotations

import dataclasses
import math

LANES = 128
SUBLANES = 8
_WORK = 900
"""Vectors of logits in a pass, at most: that is all regions of BiFormer's stages at 224 pixels."""


@dataclasses.dataclass(frozen=True)
class Part:
    """At most 128 lanes of the map, `[first, end)`, and the heads in them."""

    first: int
    end: int
    heads: int

    @property
    def lanes(self) -> int:
        """How many."""
        return self.end - self.first


@dataclasses.dataclass(frozen=True)
class Plan:
    """One problem for the kernels.

    Attributes:
      regions: rows and columns of regions.
      places: rows and columns of places of one region.
      heads, head_dim: all heads, and the lanes of each, a divisor of 128.
      topk: regions that each region is routed to.
    """

    regions: tuple[int, int]
    places: tuple[int, int]
    heads: int
    head_dim: int
    topk: int

    @property
    def count(self) -> int:
        """Regions."""
        return math.prod(self.regions)

    @property
    def tokens(self) -> int:
        """Places of a region."""
        return math.prod(self.places)

    @property
    def keys(self) -> int:
        """Keys that a query sees."""
        return self.topk * self.tokens

    @property
    def lanes(self) -> int:
        """Of the map: all heads."""
        return self.heads * self.head_dim

    @property
    def parts(self) -> tuple[Part, ...]:
        """The lanes of the map."""
        ends = [(first, min(first + LANES, self.lanes)) for first in range(0, self.lanes, LANES)]
        return tuple(Part(first, end, (end - first) // self.head_dim) for first, end in ends)

    def columns(self, part: Part) -> int:
        """Columns of the logits that a region has in a part."""
        return part.heads * self.tokens

    def block(self, part: Part) -> int:
        """Regions of a block: as many as fill the lanes."""
        return max(1, LANES // self.columns(part))

    def vectors(self, part: Part) -> int:
        """Vector registers that the logits of a block fill."""
        return -(-self.keys // SUBLANES) * -(-self.block(part) * self.columns(part) // LANES)

    @property
    def together(self) -> int:
        """Regions of a pass: the number that leaves the fewest to be made up at the end; of such, the largest."""
        step = max(self.block(part) for part in self.parts)
        each = sum(self.vectors(part) / self.block(part) for part in self.parts)
        most = min(max(step, int(_WORK / each)), self.count + step - 1)
        return min(range(step, most + 1, step), key=lambda size: (-(-self.count // size) * size, -size))

    @property
    def passes(self) -> int:
        """Of the loop over regions."""
        return -(-self.count // self.together)

    @property
    def padded(self) -> int:
        """Regions of all passes. Those beyond `count` have queries of zeros and the keys of the last region."""
        return self.passes * self.together

    def memory(self, itemsize: int, batch: int) -> int:
        """Bytes on the chip that the larger kernel, the backward one, needs for values of `itemsize` bytes.

        Maps are there twice if there are several examples. What the compiler keeps beside them for a pass is taken to
        be the logits, the probabilities and the gradients of both.
        """
        height, width = (regions * places for regions, places in zip(self.regions, self.places, strict=True))
        lanes = LANES * len(self.parts)
        maps = 7 * height * -(-width // SUBLANES) * SUBLANES * lanes * itemsize
        by_head = 2 * self.padded * sum(map(self.columns, self.parts)) * LANES * itemsize
        by_region = (2 * itemsize + 3 * 4) * self.padded * self.tokens * lanes
        vectors = sum(self.together // self.block(part) * self.vectors(part) for part in self.parts)
        return maps * (1 if batch == 1 else 2) + by_head + by_region + 4 * vectors * 4 * SUBLANES * LANES
