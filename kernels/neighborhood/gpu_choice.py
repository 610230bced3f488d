"""Which tile a GPU kernel takes: the cheapest by a model of one multiprocessor of an H100.

No timing stands behind the figures of this module. Once a GPU has been timed, its measured choices go before the
model.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

from jax.experimental import pallas as pl

from kernels.neighborhood import gpu_tiles
from kernels.neighborhood.pattern import Axis, Pattern

# Per multiprocessor and cycle, from NVIDIA's H100 data sheet (989 TFLOP/s dense bf16, 67 TFLOP/s float32, 132
# multiprocessors, 1.755 GHz) and, for the cache, 5.5 TB/s.
HALF_FLOPS = 4270.0
SINGLE_FLOPS = 256.0
CACHE_BYTES = 24.0
# Cycles for what is done to a logit besides products: mask, scale, exponential (16 a cycle), sums.
LOGIT_CYCLES = 0.2
# Cycles that a step and a program cost whatever their size.
STEP_CYCLES = 60.0
PROGRAM_CYCLES = 800.0
# What the registers of a thread may hold, and the size of a program, such that nothing spills: found by compiling
# (`python -m benchmarks.neighborhood_gpu_compile`), as was how many sums a thread has in `choose`.
LOGITS = 16
MOST_ROWS = 128
MOST_WARPS = 8


@dataclasses.dataclass(frozen=True)
class Tile:
    """Shape of the work of one program.

    Attributes:
      extents: members of a tile of residents, an axis each.
      visitors: how many come by in one step, a power of two of at least 16.
      warps: of 32 threads.
      stages: of the software pipeline that loads visitors.
    """

    extents: tuple[int, ...]
    visitors: int = 32
    warps: int = 4
    stages: int = 2


@functools.lru_cache(maxsize=1024)
def choose(pattern: Pattern, head_dim: int, head_dim_v: int, itemsize: int, *, reverse: bool = False) -> Tile:
    """The tile with the fewest cycles by the model. `reverse`: residents are keys, for dK and dV."""
    lanes = gpu_tiles.filled(head_dim) + gpu_tiles.filled(head_dim_v)
    rate = HALF_FLOPS if itemsize == 2 else SINGLE_FLOPS
    sums = 32 if itemsize > 2 else 128 if lanes <= 256 else 64
    load = (head_dim + head_dim_v) * itemsize / CACHE_BYTES
    best: tuple[float, Tile] | None = None
    for cuts in itertools.product(*(_cuts(axis, reverse) for axis in pattern.axes)):
        extents = tuple(cut.extent for cut in cuts)
        rows = gpu_tiles.filled(math.prod(extents))
        warps = max(rows // 16, pl.next_power_of_2(-(-rows * lanes // (32 * sums))))
        if rows > MOST_ROWS or warps > MOST_WARPS:
            continue
        for visitors in (16, 32, 64):
            if visitors > 16 and (itemsize > 2 or rows * visitors > 32 * warps * LOGITS):
                continue
            steps = -(-math.prod(cut.box for cut in cuts) // visitors)
            step = STEP_CYCLES + visitors * (rows * (LOGIT_CYCLES + 2 * lanes / rate) + load)
            cycles = math.prod(cut.tiles for cut in cuts) * (PROGRAM_CYCLES + steps * step)
            if best is None or cycles < best[0]:
                best = cycles, Tile(extents, visitors, warps)
    assert best is not None  # a tile of one token is always possible
    return best[1]


@dataclasses.dataclass(frozen=True)
class _Cut:
    """One way to cut an axis: members of a tile, of its box, and the number of tiles."""

    extent: int
    box: int
    tiles: int


@functools.lru_cache(maxsize=1024)
def _cuts(axis: Axis, reverse: bool) -> tuple[_Cut, ...]:
    """Every cut of a dilation group into pieces as equal as can be, up to `MOST_ROWS` members."""
    longest = int(axis.group_length(0))
    extents = sorted({-(-longest // pieces) for pieces in range(1, longest + 1)})
    cuts = []
    for extent in extents:
        if extent <= MOST_ROWS:
            places = gpu_tiles.cut(axis, extent, reverse)
            cuts.append(_Cut(extent, int((places[:, 3] - places[:, 2]).max()), len(places)))
    return tuple(cuts)
