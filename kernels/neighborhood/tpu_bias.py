"""Relative position bias in the TPU kernels: from a table to what a tile adds to its logits, and back, on the chip.

The bias of a tile depends on where its box begins relative to its queries, and on nothing else. Along z and y boxes are
windows into one larger box, so it is spread out once for that one; along x there is one copy for each offset that
occurs. This happens in the first step of a block of heads, and what comes back in the last:

1. Along x, a product with a matrix of zeros and ones (`along_x`) makes rows: the bias of the first of every eight keys
   and all queries of a tile, for each entry of the table along z and y.
2. Along z and y, a row of the larger box takes from each of these the lanes of the queries at that distance.
3. The bias of the next key is the same row one query further. So eight keys of each row are made by turning lanes. What
   would come from before the first of a run of queries has a second row, which holds it at the end of the run before.

XLA can do all this with products, but needs as long as the kernels do (docs/kernels_window.md).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kernels.neighborhood.tpu_plan import LANES, Plan, offsets
from kernels.neighborhood.tpu_tile import divided

KEYS = 8
"""Keys that are made of a row: as many as a vector has sublanes."""
LOG2E = 1 / math.log(2)
_EXACT: dict[str, Any] = {"preferred_element_type": jnp.float32, "precision": jax.lax.Precision.HIGHEST}


@dataclasses.dataclass(frozen=True)
class Spread:
    """Sizes of what is spread.

    Attributes:
      heads: of a block.
      entries: of the table along z, y, x.
      offsets, groups: offsets along x, and groups of eight keys of a box along x.
      depth, height: of the larger box; first_z, first_y: the distance of its first key from the first query.
    """

    plan: Plan

    @property
    def heads(self) -> int:
        return self.plan.block_heads

    @property
    def entries(self) -> tuple[int, int, int]:
        z, y, x = (2 * axis.axis.window - 1 for axis in self.plan.tiles.axes)
        return z, y, x

    @property
    def offsets(self) -> int:
        return len(offsets(self.plan.tiles.axes[2]))

    @property
    def groups(self) -> int:
        return self.plan.tiles.axes[2].span // KEYS

    @property
    def depth(self) -> int:
        return self._larger(0)

    @property
    def height(self) -> int:
        return self._larger(1)

    def _larger(self, number: int) -> int:
        axis = self.plan.tiles.axes[number]
        return axis.span + len(offsets(axis)) - 1

    @property
    def run(self) -> int:
        """Queries that lie side by side in the lanes of one vector."""
        return min(self.plan.tiles.axes[2].tile, LANES)

    @property
    def queries(self) -> int:
        """Queries of a tile, padded to whole vectors."""
        return -(-self.plan.tiles.queries // LANES) * LANES

    @property
    def before(self) -> int:
        """Rows before those of the first head: as many as a distance may lie outside of the table."""
        return self._rounded(sum(abs(self.first(*steps)) for steps in itertools.product((0, None), repeat=2)))

    @property
    def rows(self) -> int:
        """Rows of a head."""
        return self._rounded(math.prod(self.entries[:2]))

    @property
    def all_rows(self) -> int:
        """Rows of all heads, with those before and behind them."""
        most = (self.depth - 1) * self.entries[1] + self.height - 1 + self.before
        return self.before + self._rounded((self.heads - 1) * self.rows + max(self.rows, most))

    @staticmethod
    def _rounded(value: int) -> int:
        return -(-value // 8) * 8

    def first(self, query_z: int | None, query_y: int | None) -> int:
        """Row of the table, from the first one of a head, of the first key of the larger box and a query of the tile.

        None: the last query of the tile along that axis.
        """
        first = []
        for axis, query in zip(self.plan.tiles.axes[:2], (query_z, query_y), strict=True):
            first.append(int(offsets(axis)[0]) - (axis.tile - 1 if query is None else query) + axis.axis.window - 1)
        return first[0] * self.entries[1] + first[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the spread bias: head, offset along x, (z, y) of the larger box, key along x, query."""
        x = self.plan.tiles.axes[2]
        return (self.heads, self.offsets, self.depth, self.height, x.residues * x.span, self.plan.tiles.queries)

    @property
    def columns(self) -> int:
        """Of all rows: offset, group of keys, which of the two rows, query."""
        return self.offsets * self.groups * 2 * self.queries


def packed_table(plan: Plan, table: Float[Array, " H *W"]) -> Float[Array, "blocks ZY heads X"]:
    """The table as the kernels take it. XLA keeps tables with the heads before the last axis, so nothing is copied."""
    table = table.reshape(plan.blocks, plan.block_heads, -1, table.shape[-1])
    return jnp.swapaxes(table, 1, 2).astype(jnp.float32)


def unpacked_table(packed: Float[Array, "blocks ZY heads X"], shape: tuple[int, ...]) -> Float[Array, " H *W"]:
    """The reverse of `packed_table`."""
    return jnp.swapaxes(packed, 1, 2).reshape(shape)


@functools.lru_cache(maxsize=64)
def along_x(plan: Plan) -> np.ndarray:
    """`[entry along x, offset, group of keys, row, query]`, the last four flat: one where a pair has that distance."""
    axis, sizes = plan.tiles.axes[2], Spread(plan)
    query = np.tile(np.arange(axis.tile), plan.tiles.queries // axis.tile)
    query = np.pad(query, (0, sizes.queries - len(query)), constant_values=-(10**6))
    distance = offsets(axis)[:, None, None, None] + np.arange(0, axis.span, KEYS)[:, None, None]
    distance = distance - np.stack([query, query - sizes.run])
    entries = np.arange(sizes.entries[2]).reshape(-1, 1, 1, 1, 1)
    return (entries == distance + axis.axis.window - 1).astype(np.float32).reshape(sizes.entries[2], -1)


# --- in the kernel ----------------------------------------------------------------------------------------------------


def scratch(plan: Plan, *, backward: bool) -> dict[str, Any]:
    """The memory that a kernel needs for it, by name."""
    sizes = Spread(plan)
    # Only whole vectors of lanes can be read from any row on.
    table, rows = (sizes.all_rows, LANES), (sizes.columns // LANES, sizes.all_rows, LANES)
    shapes = {"bias_map": sizes.shape, "bias_table": table, "bias_rows": rows}
    shapes |= {"d_bias_map": sizes.shape} if backward else {}
    return {name: pltpu.VMEM(shape, jnp.float32) for name, shape in shapes.items()}


def spread(plan: Plan, refs: dict[str, Any]) -> None:
    """Fills `bias_map` from the table in `bias`; with the masks, where all tiles have the same."""
    sizes = Spread(plan)
    table, rows = refs["bias_table"], refs["bias_rows"]
    table[...] = jnp.zeros_like(table)
    for entry in range(math.prod(sizes.entries[:2])):
        table[_of_heads(sizes, entry)] = refs["bias"][0, entry]
    entries = pl.ds(0, sizes.entries[2])
    for chunk in range(rows.shape[0]):
        lanes = pl.ds(chunk * LANES, LANES)
        rows[chunk] = LOG2E * jnp.dot(table[:, entries], refs["along_x"][:, lanes], **_EXACT)

    def one(head: Any, offset: Any, z: Any, group: int) -> None:
        for chunk in range(0, sizes.queries, LANES):
            first, second = (_box(sizes, rows, (head, offset, z, group, row), chunk) for row in range(2))
            second = _run_before(sizes, second)
            is_first = _is_first(sizes)
            lanes = pl.ds(chunk, min(LANES, plan.tiles.queries - chunk))
            for y in range(sizes.height):
                mine, other = (jnp.broadcast_to(value[y : y + 1], (KEYS, LANES)) for value in (first, second))
                value = _turned(jnp.where(is_first, mine, other), 1)
                _write(plan, refs, (head, offset, z, y), group, lanes, value)

    _for_each(sizes, one)


def _write(plan: Plan, refs: dict[str, Any], where: Any, group: int, lanes: Any, value: jax.Array) -> None:
    """Eight keys of every group of a tile."""
    x, (_, _, z, y) = plan.tiles.axes[2], where
    for residue in range(x.residues):
        keys = pl.ds(residue * x.span + KEYS * group, KEYS)
        added = value[:, : lanes.size]
        if plan.is_uniform:
            for name, index in (("masks_x", keys), ("masks_y", pl.ds(y, 1)), ("masks_z", pl.ds(z, 1))):
                added = added + refs[name][0, index, lanes] if name in refs else added
        refs["bias_map"][*where, keys, lanes] = added


def fold(plan: Plan, refs: dict[str, Any]) -> None:
    """Fills `d_bias` with the gradient of the table, from that of `bias_map`, which is in `d_bias_map`."""
    sizes, x = Spread(plan), plan.tiles.axes[2]
    table, rows = refs["bias_table"], refs["bias_rows"]
    rows[...] = jnp.zeros_like(rows)

    def one(head: Any, offset: Any, z: Any, group: int) -> None:
        keys = [pl.ds(residue * x.span + KEYS * group, KEYS) for residue in range(x.residues)]
        is_first = _is_first(sizes)
        for chunk in range(0, sizes.queries, LANES):
            lanes = pl.ds(chunk, min(LANES, plan.tiles.queries - chunk))
            found: tuple[list[jax.Array], list[jax.Array]] = [], []
            for y in range(sizes.height):
                total = sum(refs["d_bias_map"][head, offset, z, y, own, lanes] for own in keys)
                total = _turned(_full(total), -1)
                for row, mine in zip(found, (is_first, ~is_first), strict=True):
                    row.append(jnp.sum(jnp.where(mine, total, 0.0), axis=0, keepdims=True))
            first, second = (jnp.concatenate(row, axis=0) for row in found)
            for which, value in enumerate((first, _run_before(sizes, second, back=True))):
                for index, mine in _boxes(sizes, (head, offset, z, group, which), chunk):
                    rows[index] = rows[index] + jnp.where(mine, value, 0.0)

    _for_each(sizes, one)
    product = (((1,), (1,)), ((), ()))
    table[:, pl.ds(0, sizes.entries[2])] = sum(
        jax.lax.dot_general(rows[chunk], refs["along_x"][:, pl.ds(chunk * LANES, LANES)], product, **_EXACT)
        for chunk in range(rows.shape[0])
    )
    for entry in range(math.prod(sizes.entries[:2])):
        refs["d_bias"][0, 0, entry] = table[_of_heads(sizes, entry)]


def _of_heads(sizes: Spread, entry: int) -> tuple[Any, ...]:
    """Rows of one entry of the table, for all heads."""
    return pl.ds(sizes.before + entry, sizes.heads, stride=sizes.rows), pl.ds(0, sizes.entries[2])


def _box(sizes: Spread, rows: Any, where: Any, chunk: int) -> jax.Array:
    """`[y of the larger box, lanes]` of a row."""
    value = jnp.zeros((sizes.height, LANES), jnp.float32)
    for index, mine in _boxes(sizes, where, chunk):
        value = jnp.where(mine, rows[index], value)
    return value


def _boxes(sizes: Spread, where: Any, chunk: int) -> list[tuple[Any, jax.Array]]:
    """What of the rows belongs to the queries of each (z, y) of a tile: index, and which lanes."""
    head, offset, z, group, row = where
    z_axis, y_axis, x_axis = sizes.plan.tiles.axes
    width = x_axis.tile * x_axis.residues
    column = ((offset * sizes.groups + group) * 2 + row) * (sizes.queries // LANES) + chunk // LANES
    query = chunk + jax.lax.broadcasted_iota(jnp.int32, (sizes.height, LANES), 1)
    found = []
    for query_z, query_y in itertools.product(range(z_axis.tile), range(y_axis.tile)):
        begin = (query_z * y_axis.tile + query_y) * width
        if begin < chunk + LANES and begin + width > chunk:
            first = sizes.before + head * sizes.rows + z * sizes.entries[1] + sizes.first(query_z, query_y)
            found.append(((column, pl.ds(first, sizes.height)), (query >= begin) & (query < begin + width)))
    return found


def _for_each(sizes: Spread, body: Any) -> None:
    """Runs `body` for each head, offset along x, z of the larger box, and group of keys."""

    def step(index: Any, _: Any) -> Any:
        rows, z = divided(index, sizes.depth)
        head, offset = divided(rows, sizes.offsets)
        for group in range(sizes.groups):
            body(head, 0 if sizes.offsets == 1 else offset, 0 if sizes.depth == 1 else z, group)
        return 0

    jax.lax.fori_loop(0, sizes.heads * sizes.offsets * sizes.depth, step, 0)


def _is_first(sizes: Spread) -> jax.Array:
    """`[key, query]`: whether what this key takes from here, when lanes are turned, is in the first row."""
    key, query = (jax.lax.broadcasted_iota(jnp.int32, (KEYS, LANES), number) for number in range(2))
    return jax.lax.rem(query, jnp.full_like(query, sizes.run)) + key < sizes.run


def _run_before(sizes: Spread, value: jax.Array, back: bool = False) -> jax.Array:
    """With every run of queries moved to the place of the run before it, or `back`."""
    by = sizes.run if back else LANES - sizes.run
    return pltpu.roll(value, by, 1) if by % LANES else value


def _full(value: jax.Array) -> jax.Array:
    """With all lanes of a vector."""
    rows, lanes = value.shape
    missing = jnp.zeros((rows, LANES - lanes), value.dtype)
    return value if lanes == LANES else jnp.concatenate([value, missing], axis=1)


def _turned(value: jax.Array, direction: int) -> jax.Array:
    """Row n with its lanes turned by n, to the right (1) or to the left (-1).

    By bits of n, since not every generation turns every row by a number of its own.
    """
    row = jax.lax.broadcasted_iota(jnp.int32, value.shape, 0)
    for bit in (1, 2, 4):
        value = jnp.where(row & bit != 0, pltpu.roll(value, direction * bit % LANES, 1), value)
    return value
