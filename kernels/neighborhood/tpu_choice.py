"""Which tiles, bands and blocks of heads a TPU kernel works with."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels.neighborhood import tuning
from kernels.neighborhood.pattern import Pattern
from kernels.neighborhood.tiles import group_count, with_examples
from kernels.neighborhood.tpu_bias import Spread
from kernels.neighborhood.tpu_blocks import Blocks
from kernels.neighborhood.tpu_plan import LANES, Plan, block_sizes, make_plan

_NAMES = {"7": "tpu7x", "7x": "tpu7x"}
_UNKNOWN_VMEM = 64 * 2**20
"""For a program that is traced without saying for which chip: the least of the generations from v5e on. (v4 has 16 MiB:
export for it on one, or under a mesh of its topology.)"""


def chip_name() -> str:
    """The chip that is traced for, as `tuning` names it; the commonest where nothing says which."""
    try:
        kind = pltpu.get_tpu_info().chip_version.value
    except ValueError:
        return "v5e"
    return _NAMES.get(kind, kind)


def chip_memory() -> int:
    """Bytes of vector memory that a kernel may use on the chip that is traced for: three quarters of it."""
    try:
        capacity = pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:
        capacity = _UNKNOWN_VMEM
    return capacity * 3 // 4


def choose(
    pattern: Pattern,
    heads: int,
    head_dim: int,
    dtype: Any,
    direction: str,
    *,
    batch: int = 1,
    bias: bool = False,
    extra: int = 0,
    vmem: int | None = None,
) -> Blocks:
    """The layout for a problem: with the tiles measured best for one like it, else by a model of the cost.

    Args:
      vmem: bytes on the chip; those of the chip that is traced for unless given.

    Raises:
      ValueError: nothing fits the memory of the chip.
    """
    vmem = chip_memory() if vmem is None else vmem
    itemsize = jnp.dtype(dtype).itemsize

    def chosen(examples: int) -> Blocks:
        whole = pattern if examples == 1 else with_examples(pattern, examples)
        tuned = tuning.lookup(chip_name(), tuning.problem(whole, head_dim, dtype, direction))
        return _choose(whole, heads, head_dim, itemsize, direction, batch, bias, extra, examples, tuned, vmem)

    together = side_by_side(pattern, batch, extra)
    if together > 1:
        with contextlib.suppress(ValueError):
            return chosen(together)
    return chosen(1)


def side_by_side(pattern: Pattern, batch: int, extra: int) -> int:
    """How many examples lie side by side along x.

    XLA keeps arrays whose last axis of the map would need padding with the batch in its place, if that needs none.
    Reading them so saves a copy, and tiles of small maps take groups of several examples.
    """
    rows = 8
    return rows if batch % rows == 0 and pattern.axes[-1].length % rows and not extra and len(pattern.axes) > 1 else 1


@functools.lru_cache(maxsize=256)
def _choose(
    pattern: Pattern,
    heads: int,
    head_dim: int,
    itemsize: int,
    direction: str,
    batch: int,
    bias: bool,
    extra: int,
    examples: int,
    tuned: tuple[tuple[int, ...], int] | None,
    vmem: int,
) -> Blocks:
    costs = {one: cost(pattern, heads, head_dim, one[0], one[1], extra) for one in candidates(pattern)}
    if tuned is not None:
        costs[tuned] = 0.0
    best: tuple[float, Plan] | None = None
    smallest = math.inf
    for members, residues in sorted(costs, key=lambda one: costs[one])[:12]:
        for bands, block in _splits(pattern, members, heads, head_dim):
            if examples > 1 and bands > 1:
                break
            plan = make_plan(
                pattern,
                heads,
                head_dim,
                tile=members,
                residues=residues,
                bands=bands,
                block_heads=block,
                extra=extra,
                examples=examples,
            )
            if not all(layout.can_band for layout in plan.layouts if layout.tiles.bands > 1):
                continue
            needed = memory(plan, itemsize, direction, batch // examples, bias)
            smallest = min(smallest, needed)
            if needed > vmem:
                continue
            # A grid of more than one step is a pipeline, which takes two steps more to fill and drain.
            steps = plan.blocks * plan.bands * batch // examples
            total = costs[members, residues] * (1 if steps == 1 else (steps + 2) / steps)
            if best is None or total < best[0]:
                best = total, plan
            break
    if best is None:
        raise ValueError(
            f"a band of the map {pattern.shape} needs {smallest / 2**20:.0f} MiB on the chip, which has "
            f"{vmem / 2**20:.0f}"
        )
    return Blocks(best[1], vmem)


def candidates(pattern: Pattern) -> list[tuple[tuple[int, ...], int]]:
    """Tiles to choose from, `(members along each axis, residues)`."""
    axes = pattern.axes
    groups = [*(axis.dilation for axis in axes[:-1]), group_count(pattern)]
    longest = [math.ceil(axis.length / count) for axis, count in zip(axes, groups, strict=True)]
    options = []
    for number, length in enumerate(longest):
        last = number == len(longest) - 1
        sizes = [8, 16, 32, 64, 128, 256, 512] if last else [1, 2, 3, 4, 5, 6, 7, 8, 14, 16, 32]
        limit = -(-length // 8) * 8 if last else length
        options.append([size for size in sizes if size <= limit] or [limit])
    residues = [r for r in (1, 2, 4, 8) if groups[-1] % r == 0]
    found = [(members, r) for members in itertools.product(*options) for r in residues if math.prod(members) * r <= 512]
    return found


def cost(
    pattern: Pattern, heads: int, head_dim: int, tile: tuple[int, ...], residues: int = 1, extra: int = 0
) -> float:
    """Cycles of the forward kernel, roughly: what a model of its vector work gives, and nothing of memory."""
    plan = make_plan(pattern, heads, head_dim, tile=tile, residues=residues, extra=extra)
    keys, queries = plan.tiles.keys + plan.extra_rows, plan.tiles.queries
    vectors = keys / 8 * -(-queries // LANES)
    width = -(-head_dim // LANES) * heads
    runs = plan.tiles.axes[0].span * plan.tiles.axes[1].span * residues
    per_tile = heads * (5.5 * vectors + 30) + len(plan.parts) * (0.4 * keys + runs) + width * queries / 8 + 60
    # Queries and outputs that cannot be read where they lie are copied.
    copies = 0 if plan.is_direct else 2.5 * len(plan.parts) * pattern.tokens / 8
    return plan.tiles.count * per_tile + copies


def memory(plan: Plan, itemsize: int, direction: str, batch: int, bias: bool) -> int:
    """Bytes on the chip: blocks twice where the grid has more than one step, unpacked maps, tables."""
    query, key, query_map, key_map = 1, 1, 1, 1
    for number, layout in enumerate(plan.layouts):
        last = number == 2
        query *= _rounded(layout.queries, 16 if last else 1)
        key *= _rounded(layout.keys, 16 if last else 1)
        query_map *= _rounded(layout.padded_queries, 8 if last else 1)
        key_map *= _rounded(layout.padded_keys, 8 if last else 1)
    if plan.examples > 1:
        # Every token is a row of so many examples, padded to 16 of a narrow type.
        query, key = (count * _rounded(plan.examples, 32 // itemsize) // plan.examples for count in (query, key))
    lanes = _rounded(plan.lanes, LANES)
    rows = plan.band_tiles * _rounded(plan.block_heads, 8) * _rounded(plan.tiles.queries, LANES) * 4
    is_backward = direction == "backward"
    partial = itemsize if plan.bands == 1 else 4
    blocks = (3 if is_backward else 2) * query * lanes * itemsize + 2 * key * lanes * itemsize + rows
    if is_backward:
        blocks += 2 * key * lanes * partial + rows
    scratch = (4 if is_backward else 2) * key_map * lanes * 4
    if not plan.is_direct:
        scratch += (3 if is_backward else 2) * query_map * lanes * 4
    tables = sum(mask.nbytes for mask in plan.masks)
    if bias:
        scratch += (2 if is_backward else 1) * bias_bytes(plan)
        sizes = Spread(plan)
        scratch += 4 * sizes.all_rows * (2 * sizes.columns + LANES)
        tables += 4 * _rounded(sizes.entries[2], 8) * sizes.columns
        tables += 8 * math.prod(sizes.entries[:2]) * _rounded(sizes.heads, 8) * LANES
    work = 4 * plan.block_heads * plan.tiles.keys * _rounded(plan.tiles.queries, LANES) * 2
    buffers = 1 if plan.blocks * plan.bands * batch == 1 else 2
    return buffers * (blocks + tables) + scratch + work


def bias_bytes(plan: Plan) -> int:
    """Bytes of the spread bias of a block."""
    *others, queries = Spread(plan).shape
    return 4 * math.prod(others) * _rounded(queries, LANES)


def _splits(pattern: Pattern, tile: tuple[int, ...], heads: int, head_dim: int) -> list[tuple[int, int]]:
    """`(bands, heads of a block)`: first fewer heads, then more bands, since bands read keys twice."""
    first = pattern.axes[0]
    along = math.ceil(math.ceil(first.length / first.dilation) / tile[0])
    bands = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= along]
    return [(band, block) for band in bands for block in block_sizes(heads, head_dim)]


def _rounded(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
