"""How the TPU kernels read and write a tile: inside the kernel, on references to memory on the chip.

A narrow type packs two rows into one, and only whole vectors of lanes can be read from any row on. So maps whose tiles
lie anywhere are kept unpacked, `[part, Z, Y, X, 128]` float32 with a part for every 128 lanes; then a row of a tile is
one read at any start with any step, and the dilation costs nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.neighborhood.tpu_plan import ALIGNMENT, Plan

CHUNK = 256
"""Rows copied at a time where a map has a long last axis."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one tile is: scalars read from `Plan.starts`.

    Attributes:
      query, key: first token along z, y, x, within the blocks.
      mask, offset: classes along z, y, x.
      index: number of the tile in its band.
    """

    query: tuple[Any, Any, Any]
    key: tuple[Any, Any, Any]
    mask: tuple[Any, Any, Any]
    offset: tuple[Any, Any, Any]
    index: Any


def divided(number: Any, by: int) -> tuple[Any, Any]:
    """Quotient and remainder of a number that is not negative.

    Not by `//` and `%`: their lowering looks at the sign, and for that asks which TPU is there, which is none on the
    machine that exports a program.
    """
    return jax.lax.div(number, jnp.int32(by)), jax.lax.rem(number, jnp.int32(by))


def for_each_tile(plan: Plan, starts: Any, band: Any, body: Callable[[Place], None], *, together: int = 1) -> None:
    """Runs `body` on every tile of a band, in order, `together` of them in a pass of the loop."""
    counts = [layout.tiles.count // layout.tiles.bands for layout in plan.layouts]
    banded = [layout.tiles.bands > 1 for layout in plan.layouts]

    def step(index: Any, _: Any) -> Any:
        rows, column = divided(index, counts[2])
        numbers = (*divided(rows, counts[1]), column)
        columns = []
        for number, count, first, split in zip(numbers, counts, plan.starts_of_axis, banded, strict=True):
            row = first + 4 * (number + band * count if split else number)
            columns.append([starts[row + column] for column in range(4)])
        query, key, mask, offset = zip(*columns, strict=True)
        body(Place(query, key, mask, offset, index))
        return 0

    jax.lax.fori_loop(0, plan.band_tiles, step, 0, unroll=together)


def query_rows(plan: Plan, place: Place) -> list[tuple[Any, Any, Any]]:
    """Indices `(z, y, x rows)` of the runs of queries of a tile, in its order."""
    axes = plan.tiles.axes
    x = pl.multiple_of(place.query[2], ALIGNMENT) if plan.is_direct else place.query[2]
    return _rows(axes, (place.query[0], place.query[1], x), [axis.tile for axis in axes])


def key_rows(plan: Plan, place: Place) -> list[tuple[Any, Any, Any]]:
    """Indices `(z, y, x rows)` of the runs of keys of a tile, in its order."""
    return _rows(plan.tiles.axes, place.key, [axis.span for axis in plan.tiles.axes])


def _rows(axes: Any, start: Sequence[Any], members: Sequence[int]) -> list[tuple[Any, Any, Any]]:
    (step_z, step_y, step_x), residues, apart = [axis.step for axis in axes], axes[2].residues, axes[2].apart
    return [
        (start[0] + step_z * z, start[1] + step_y * y, pl.ds(start[2] + apart * residue, members[2], stride=step_x))
        for z in range(members[0])
        for y in range(members[1])
        for residue in range(residues)
    ]


def read_part(source: Any, part: int, rows: Sequence[tuple[Any, Any, Any]], width: int) -> jax.Array:
    """`[tokens of the tile, width]` of an unpacked map."""
    lanes = pl.ds(0, width)
    return jnp.concatenate([source[part, z, y, x, lanes] for z, y, x in rows], axis=0)


def read_block(source: Any, lanes: tuple[int, int], rows: Sequence[tuple[Any, Any, Any]]) -> jax.Array:
    """`[tokens of the tile, lanes]` of a block as it came, `[1, Z, Y, X, lanes]`; for aligned tiles."""
    return jnp.concatenate([source[0, z, y, x, pl.ds(lanes[0], lanes[1] - lanes[0])] for z, y, x in rows], axis=0)


def unpack(plan: Plan, source: Any, target: Any, existing: tuple[Any, Any, Any] = (None, None, None)) -> None:
    """Copies a block `[1, Z, Y, X, lanes]` to an unpacked map; what the target has beyond the block becomes zero.

    So do the tokens of a block that hangs over the end of the array: memory that nobody wrote may hold NaN. `existing`
    is the number of tokens along z, y, x that exist, None for all.
    """
    _, full_depth, full_height, full_width, _ = target.shape
    depth, height, width = _extent(plan, source)

    def copy(z: Any, y: Any) -> None:
        for first, count in _chunks(plan, width):
            for part, (lo, hi) in enumerate(plan.parts):
                rows = source[_rows_of(plan, z, y, first, count, lo, hi)].astype(jnp.float32)
                x = first + jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0)
                for index, end in zip((z, y, x), existing, strict=True):
                    rows = rows if end is None else jnp.where(index < end, rows, 0.0)
                target[part, z, y, pl.ds(first, count), pl.ds(0, hi - lo)] = rows
        if full_width > width:
            target[:, z, y, pl.ds(width, full_width - width)] = jnp.zeros(
                (target.shape[0], full_width - width, target.shape[-1]), jnp.float32
            )

    _for_rows(0, depth, 0, height, copy)
    _for_rows(0, depth, height, full_height, lambda z, y: _clear_row(target, z, y))
    _for_rows(depth, full_depth, 0, full_height, lambda z, y: _clear_row(target, z, y))


def clear(target: Any) -> None:
    """Sets an unpacked map to zero."""
    _for_rows(0, target.shape[1], 0, target.shape[2], lambda z, y: _clear_row(target, z, y))


def _clear_row(target: Any, z: Any, y: Any) -> None:
    parts, _, _, width, lanes = target.shape
    for first, count in _chunks(None, width):
        target[:, z, y, pl.ds(first, count)] = jnp.zeros((parts, count, lanes), target.dtype)


def pack(plan: Plan, source: Any, target: Any) -> None:
    """Copies an unpacked map to a block; the reverse of `unpack`."""
    depth, height, width = _extent(plan, target)

    def copy(z: Any, y: Any) -> None:
        for first, count in _chunks(plan, width):
            for part, (lo, hi) in enumerate(plan.parts):
                rows = source[part, z, y, pl.ds(first, count), pl.ds(0, hi - lo)]
                target[_rows_of(plan, z, y, first, count, lo, hi)] = rows.astype(target.dtype)

    _for_rows(0, depth, 0, height, copy)


def _extent(plan: Plan, block: Any) -> tuple[int, int, int]:
    """Tokens along z, y, x of a block: `[1, Z, Y, X, lanes]`, or with examples side by side `[Z, Y, X, B, lanes]`."""
    if plan.examples == 1:
        return block.shape[1:4]
    return *block.shape[:2], block.shape[2] * block.shape[3]


def _rows_of(plan: Plan, z: Any, y: Any, first: int, count: int, lo: int, hi: int) -> tuple[Any, ...]:
    """Index of a run of tokens in a block."""
    if plan.examples == 1:
        return 0, z, y, pl.ds(first, count), pl.ds(lo, hi - lo)
    return z, y, first // plan.examples, slice(None), pl.ds(lo, hi - lo)


def _for_rows(z0: int, z1: int, y0: int, y1: int, body: Callable[[Any, Any], None]) -> None:
    if z1 <= z0 or y1 <= y0:
        return

    def step(index: Any, _: Any) -> Any:
        z, y = divided(index, y1 - y0)
        body(z0 + z, y0 + y)
        return 0

    jax.lax.fori_loop(0, (z1 - z0) * (y1 - y0), step, 0)


def _chunks(plan: Plan | None, width: int) -> list[tuple[int, int]]:
    """Runs that a row is copied in. Written out: only the rows of one-dimensional maps are long."""
    most = CHUNK if plan is None or plan.examples == 1 else plan.examples
    return [(first, min(most, width - first)) for first in range(0, width, most)]
