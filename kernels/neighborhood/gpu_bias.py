"""The gradient of the relative position bias on GPUs: the sum of the logits' gradients over all pairs of one offset.

A tile of queries and its box of keys make a rectangle of logits. The offset of a pair depends on its place in the
rectangle and on one number an axis, how far the box begins before the tile, which is the same for all tiles but those
at a border. So a program adds up the rectangles of many tiles and examples that share these numbers, in registers and
in a fixed order; what it writes does not grow with the batch, and products with one-hot matrices outside turn
rectangles into the table.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from kernels.neighborhood import gpu_program, gpu_tiles
from kernels.neighborhood.gpu_backward import probabilities
from kernels.neighborhood.gpu_choice import Tile
from kernels.neighborhood.pattern import Pattern

PROGRAMS = 1024
"""Enough to fill a GPU of 132 multiprocessors with several programs each."""


@dataclasses.dataclass(frozen=True, eq=False)
class Shares:
    """Work for P programs a head and step: a run of tiles (of one kind) times examples each.

    Attributes:
      order: all tiles, those of one kind together.
      runs: of each program, begin and number of tiles of its kind in `order`, first item and number of items; item i is
        tile `i % tiles` of example `i // tiles`.
      leads: of each program and axis, first member of the box less first member of the tile.
    """

    order: Int[np.ndarray, " T"]
    runs: Int[np.ndarray, "P 4"]
    leads: Int[np.ndarray, "P A"]


@functools.lru_cache(maxsize=64)
def make_shares(tiling: gpu_tiles.Tiling, batch: int, programs: int) -> Shares:
    """About `programs` shares of the same size, more if there are more kinds of tiles."""
    columns = []
    for axis in tiling.axes:
        places = tiling.tables[axis.places : axis.places + 3 * axis.tiles].reshape(axis.tiles, 3)
        columns.append(places[:, 2] - places[:, 1])
    leads = np.stack([column.ravel() for column in np.meshgrid(*columns, indexing="ij")], axis=1)
    kinds, kind = np.unique(leads, axis=0, return_inverse=True)
    kind = kind.ravel()
    order = np.argsort(kind, kind="stable")
    counts = np.bincount(kind)
    begins = np.cumsum(counts) - counts
    size = max(1, -(-len(order) * batch // programs))
    runs, owners = [], []
    for number, (begin, count) in enumerate(zip(begins.tolist(), counts.tolist(), strict=True)):
        for first in range(0, count * batch, size):
            runs.append((begin, count, first, min(size, count * batch - first)))
            owners.append(number)
    return Shares(order.astype(np.int32), np.asarray(runs, np.int32), kinds[owners].astype(np.int32))


def bias_gradient(
    inputs: dict[str, Any], *, pattern: Pattern, scale: float, tile: Tile, interpret: bool
) -> Float[Array, "H T"]:
    """Gradient of the table of relative positions. `inputs` as for `gpu_backward.query_gradient`."""
    batch, _, heads, _ = inputs["q"].shape
    tiling = gpu_tiles.make_tiling(pattern, tile.extents)
    steps = tiling.steps(tile.visitors)
    shares = make_shares(tiling, batch, max(1, PROGRAMS // (heads * steps)))
    names = ("q", "k", "v", "bias", "d_out", "lse", "delta")
    rectangles = pl.pallas_call(
        functools.partial(neighborhood_dbias, pattern=pattern, tiling=tiling, scale=scale, width=tile.visitors),
        out_shape=jax.ShapeDtypeStruct((heads, len(shares.runs), tiling.rows, steps * tile.visitors), jnp.float32),
        grid=(len(shares.runs) * heads * steps,),
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="neighborhood_dbias",
    )(
        {
            "tables": jnp.asarray(tiling.tables),
            "order": jnp.asarray(shares.order),
            "runs": jnp.asarray(shares.runs),
            **{name: inputs[name] for name in names},
        }
    )
    return sum_rectangles(rectangles, pattern, tiling, shares)


def sum_rectangles(
    rectangles: Float[Array, "H P R V"], pattern: Pattern, tiling: gpu_tiles.Tiling, shares: Shares
) -> Float[Array, "H T"]:
    """Adds up rectangles of logit gradients by relative position: a product with one-hot matrices, an axis each."""
    extents, boxes = [axis.extent for axis in tiling.axes], [axis.box for axis in tiling.axes]
    sums = rectangles[:, :, : int(np.prod(extents)), : tiling.box]
    sums = sums.reshape(*rectangles.shape[:2], *extents, *boxes)
    rank = len(extents)
    tile_names, box_names, table_names = "abc"[:rank], "uvw"[:rank], "xyz"[:rank]
    one_hots = []
    for number, axis in enumerate(tiling.axes):
        offset = shares.leads[:, number, None, None] + np.arange(axis.box) - np.arange(axis.extent)[:, None]
        position = offset + pattern.axes[number].window - 1
        one_hots.append((position[..., None] == np.arange(pattern.bias_shape[number])).astype(np.float32))
    terms = [f"p{t}{u}{x}" for t, u, x in zip(tile_names, box_names, table_names, strict=True)]
    equation = ",".join([f"hp{tile_names}{box_names}", *terms]) + f"->h{table_names}"
    table = jnp.einsum(equation, sums, *one_hots, precision=lax.Precision.HIGHEST, optimize="greedy")
    return table.reshape(table.shape[0], -1)


def neighborhood_dbias(
    refs: dict[str, Any], rectangles: Any, *, pattern: Pattern, tiling: gpu_tiles.Tiling, scale: float, width: int
) -> None:
    """The kernel: one program adds up one step of its share of tiles of one head."""
    heads, kv_heads = refs["q"].shape[2], refs["k"].shape[2]
    share, head, step = gpu_program.place(pl.program_id(0), heads, tiling.steps(width))
    kv_head = lax.div(head, heads // kv_heads)
    begin, tiles, first, items = (refs["runs"][share, column] for column in range(4))

    def add(item: Any, sums: Array) -> Array:
        batch, tile = lax.div(first + item, tiles), refs["order"][begin + lax.rem(first + item, tiles)]
        queries = gpu_program.residents(tiling, refs["tables"], tile)
        keys = gpu_program.visitors(tiling, queries, step, width)
        q = gpu_program.gather(refs["q"], batch, queries.tokens, head, queries.valid)
        k = gpu_program.gather(refs["k"], batch, keys.tokens, kv_head, keys.valid)
        v = gpu_program.gather(refs["v"], batch, keys.tokens, kv_head, keys.valid)
        d_out = gpu_program.gather(refs["d_out"], batch, queries.tokens, head, queries.valid)
        lse = gpu_program.gather_numbers(refs["lse"], batch, queries.tokens, head, queries.valid)[:, None]
        delta = gpu_program.gather_numbers(refs["delta"], batch, queries.tokens, head, queries.valid)[:, None]
        mask = gpu_program.meets(queries, keys)
        bias = gpu_program.look_up(refs["bias"], head, pattern, queries, keys, mask)
        probs = probabilities(q, k, mask, bias, lse, scale=scale)
        return sums + probs * (gpu_program.product(d_out, v, contract=(1, 1)) - delta)

    sums = lax.fori_loop(0, items, add, jnp.zeros((tiling.rows, width), jnp.float32))
    rows, columns = jnp.arange(tiling.rows, dtype=jnp.int32), step * width + jnp.arange(width, dtype=jnp.int32)
    triton.store(rectangles.at[head, share, rows[:, None], columns[None, :]], sums)
