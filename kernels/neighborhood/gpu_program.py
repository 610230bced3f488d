"""What every GPU kernel does: find its tile and what it looks at, read and write rows by pointer, multiply.

Functions of arrays inside a Pallas kernel for Triton, where every array has a power of two of elements along each axis.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, Int

from kernels.neighborhood.gpu_tiles import Tiling, filled
from kernels.neighborhood.pattern import Pattern


@dataclasses.dataclass(frozen=True)
class Residents:
    """The tile of a program, inside a kernel: R rows. Lists have one entry for each axis.

    Attributes:
      tokens: row-major index in the map; valid: whether the row is a token at all.
      members: place in the dilation group.
      starts, counts: interval of visitors; a row that is no token has an empty one.
      groups, boxes: dilation group and first member of the box, scalars.
    """

    tokens: Int[Array, " R"]
    valid: Bool[Array, " R"]
    members: list[Int[Array, " R"]]
    starts: list[Int[Array, " R"]]
    counts: list[Int[Array, " R"]]
    groups: list[Any]
    boxes: list[Any]


@dataclasses.dataclass(frozen=True)
class Visitors:
    """What comes by in one step, inside a kernel: V columns. `valid`: the column is a token of the map."""

    tokens: Int[Array, " V"]
    valid: Bool[Array, " V"]
    members: list[Int[Array, " V"]]


def residents(tiling: Tiling, tables: Any, tile: Any) -> Residents:
    """The residents of the tile with this number; `tables` is the reference of `tiling.tables`."""
    rest = jnp.arange(tiling.rows, dtype=jnp.int32)
    coordinates: list[Any] = []
    for axis in reversed(tiling.axes[1:]):
        coordinates.insert(0, lax.rem(rest, axis.extent))
        rest = lax.div(rest, axis.extent)
    coordinates.insert(0, rest)
    numbers: list[Any] = []
    for axis in reversed(tiling.axes):
        numbers.insert(0, lax.rem(tile, axis.tiles))
        tile = lax.div(tile, axis.tiles)

    tokens, valid = jnp.zeros(tiling.rows, jnp.int32), coordinates[0] < tiling.axes[0].extent
    members, indices, groups, boxes = [], [], [], []
    for axis, coordinate, number in zip(tiling.axes, coordinates, numbers, strict=True):
        group, origin, box = (tables[axis.places + 3 * number + column] for column in range(3))
        member = origin + coordinate
        index = group + axis.dilation * member
        valid &= index < axis.length
        tokens = tokens * axis.length + index
        members.append(member)
        indices.append(index)
        groups.append(group)
        boxes.append(box)
    starts, counts = [], []
    for axis, index in zip(tiling.axes, indices, strict=True):
        starts.append(triton.load(tables.at[axis.starts + index], mask=valid, other=0))
        counts.append(triton.load(tables.at[axis.counts + index], mask=valid, other=0))
    return Residents(tokens, valid, members, starts, counts, groups, boxes)


def visitors(tiling: Tiling, resident: Residents, step: Any, width: int) -> Visitors:
    """The visitors number `step * width` to `(step + 1) * width` of the box, in row-major order.

    Columns behind the end of the box may be tokens, but none that a resident sees.
    """
    rest = step * width + jnp.arange(width, dtype=jnp.int32)
    coordinates: list[Any] = []
    for axis in reversed(tiling.axes[1:]):
        coordinates.insert(0, lax.rem(rest, axis.box))
        rest = lax.div(rest, axis.box)
    coordinates.insert(0, rest)
    tokens, valid, members = jnp.zeros(width, jnp.int32), jnp.ones(width, jnp.bool_), []
    for axis, coordinate, group, box in zip(tiling.axes, coordinates, resident.groups, resident.boxes, strict=True):
        member = box + coordinate
        index = group + axis.dilation * member
        valid &= index < axis.length
        tokens = tokens * axis.length + index
        members.append(member)
    return Visitors(tokens, valid, members)


def meets(resident: Residents, visitor: Visitors) -> Bool[Array, "R V"]:
    """Which residents and visitors belong to each other."""
    mask = None
    for start, count, member in zip(resident.starts, resident.counts, visitor.members, strict=True):
        # A member before the start wraps around to a huge unsigned number: one comparison is enough.
        offset = lax.bitcast_convert_type(member[None, :] - start[:, None], jnp.uint32)
        inside = offset < lax.bitcast_convert_type(count, jnp.uint32)[:, None]
        mask = inside if mask is None else mask & inside
    assert mask is not None
    return mask


def look_up(
    table: Any,
    head: Any,
    pattern: Pattern,
    resident: Residents,
    visitor: Visitors,
    mask: Bool[Array, "R V"],
    *,
    reverse: bool = False,
) -> Any:
    """Bias of residents and visitors that belong to each other, zero elsewhere; 0 if there is no table.

    Args:
      table: reference of `[H, T]`, where T enumerates `key - query + window - 1` in row-major order.
      reverse: residents are keys.
    """
    if table is None:
        return 0.0
    sign = -1 if reverse else 1
    rows: Any = 0
    columns: Any = 0
    for axis, extent, own, other in zip(
        pattern.axes, pattern.bias_shape, resident.members, visitor.members, strict=True
    ):
        rows = rows * extent + (axis.window - 1) - sign * own
        columns = columns * extent + sign * other
    return triton.load(table.at[head, rows[:, None] + columns[None, :]], mask=mask, other=0)


def gather(
    array: Any, batch: Any, tokens: Int[Array, " R"], head: Any, valid: Bool[Array, " R"]
) -> Float[Array, "R P"]:
    """Rows `array[batch, tokens, head]`, zero where not valid and in the lanes that fill up to P, a power of two."""
    width = array.shape[-1]
    lanes = jnp.arange(filled(width), dtype=jnp.int32)
    mask = valid[:, None] if lanes.size == width else valid[:, None] & (lanes < width)[None, :]
    mask = jnp.broadcast_to(mask, (tokens.size, lanes.size))
    return triton.load(array.at[batch, tokens[:, None], head, lanes[None, :]], mask=mask, other=0)


def gather_numbers(
    array: Any, batch: Any, tokens: Int[Array, " R"], head: Any, valid: Bool[Array, " R"]
) -> Float[Array, " R"]:
    """One number a row, `array[batch, tokens, head]`; zero where not valid."""
    return triton.load(array.at[batch, tokens, head], mask=valid, other=0)


def scatter(
    array: Any, batch: Any, tokens: Int[Array, " R"], head: Any, valid: Bool[Array, " R"], values: Float[Array, "R P"]
) -> None:
    """Writes rows to `array[batch, tokens, head]` where valid."""
    width = array.shape[-1]
    lanes = jnp.arange(values.shape[-1], dtype=jnp.int32)
    mask = jnp.broadcast_to(valid[:, None] & (lanes < width)[None, :], values.shape)
    # Rows that are no token may have the index of one: they must not write that one's old value back.
    rows = jnp.where(valid, tokens, array.shape[1])
    triton.store(array.at[batch, rows[:, None], head, lanes[None, :]], values.astype(array.dtype), mask=mask)


def scatter_numbers(
    array: Any, batch: Any, tokens: Int[Array, " R"], head: Any, valid: Bool[Array, " R"], values: Float[Array, " R"]
) -> None:
    """Writes one number a row to `array[batch, tokens, head]` where valid."""
    triton.store(array.at[batch, jnp.where(valid, tokens, array.shape[1]), head], values, mask=valid)


def product(
    a: Float[Array, "R K"], b: Float[Array, "S V"], *, contract: tuple[int, int] = (1, 0)
) -> Float[Array, "A B"]:
    """Matrix product over the axes `contract` of a and b, summed in float32; float32 factors are not rounded."""
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def place(number: Any, *counts: int) -> tuple[jax.Array, ...]:
    """Coordinates of a program: its number in the mixed base of `counts`, the last one fastest. The first is free."""
    coordinates: list[Any] = []
    for count in reversed(counts):
        coordinates.insert(0, lax.rem(number, count))
        number = lax.div(number, count)
    return (number, *coordinates)
