"""The forward kernel of neighborhood attention for TPUs (Pallas Mosaic).

A tile of queries meets its box of keys in two products with a softmax between them, all on the chip; no running maximum
is needed, since the box holds every key. Logits lie as `[keys, queries]`: masks are then a sum of a row and a small
block, reductions over keys run down the sublanes, and the logsumexp comes out as a dense row.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.neighborhood import tpu_bias
from kernels.neighborhood.tpu_bias import LOG2E
from kernels.neighborhood.tpu_blocks import Blocks
from kernels.neighborhood.tpu_plan import Plan
from kernels.neighborhood.tpu_tile import (
    Place,
    for_each_tile,
    key_rows,
    pack,
    query_rows,
    read_block,
    read_part,
    unpack,
)


def forward(blocks: Blocks, q: Any, k: Any, v: Any, *, extra: Any, bias: Any, scale: float) -> tuple[Any, Any]:
    """Output like q and logsumexp by tile, `Blocks.rows_shape`.

    Args:
      q, k, v: `[B, Z, Y, X, H * D]`; `[Z, Y, X, B, H * D]` for a plan with examples side by side.
      extra: padded extra keys and values `[B, rows, H * D]`; or None.
      bias: `tpu_bias.packed_table`; or None.
    """
    plan = blocks.plan
    operands = blocks.operands(q, k, v, extra, bias)
    outputs = {"out": jax.ShapeDtypeStruct(q.shape, v.dtype), "lse": blocks.rows_shape(q)}
    scratch = {"k_map": blocks.key_map(), "v_map": blocks.key_map()}
    if not plan.is_direct:
        scratch |= {"q_map": blocks.query_map(), "out_map": blocks.query_map()}
    if bias is not None:
        scratch |= tpu_bias.scratch(plan, backward=False)
    results = blocks.call(
        functools.partial(_kernel, plan, scale), operands, outputs, scratch, name="neighborhood_attention_forward"
    )
    return results["out"], results["lse"]


def _kernel(plan: Plan, scale: float, band: Any, refs: dict[str, Any]) -> None:
    if "bias" in refs:

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            tpu_bias.spread(plan, refs)

    unpack(plan, refs["k"], refs["k_map"])
    unpack(plan, refs["v"], refs["v_map"])
    if not plan.is_direct:
        unpack(plan, refs["q"], refs["q_map"], plan.existing_queries(band))
    together = tiles_together(plan)
    for_each_tile(plan, refs["starts"], band, functools.partial(_tile, plan, scale, refs), together=together)
    if not plan.is_direct:
        pack(plan, refs["out_map"], refs["out"])


def _tile(plan: Plan, scale: float, refs: dict[str, Any], place: Place) -> None:
    keys = tile_keys(plan, refs, "k_map", "extra_keys", place)
    logits = tile_logits(plan, scale, refs, place, keys, tile_queries(plan, refs, "q", place))
    values = tile_keys(plan, refs, "v_map", "extra_values", place)
    narrow, precision = refs["v"].dtype, product_precision(refs["v"].dtype)
    # One phase after the other over all heads, rather than head by head: the compiler then overlaps the heads.
    weights, lse, shares = [], [], []
    for head in range(plan.block_heads):
        largest = jnp.max(logits[head], axis=0, keepdims=True)
        probs = jnp.exp2(logits[head] - largest)
        total = jnp.sum(probs, axis=0, keepdims=True)
        weights.append(probs.astype(narrow))
        shares.append(1 / total)
        lse.append((largest + jnp.log2(total)) / LOG2E)
    turned = [part.T for part in values]
    outputs = []
    for head in range(plan.block_heads):
        value = head_rows(plan, turned, head).astype(narrow)
        product = jnp.dot(value, weights[head], preferred_element_type=jnp.float32, precision=precision)
        outputs.append(product * shares[head])
    write_queries(plan, refs, "out", jnp.concatenate(outputs, axis=0).T, place)
    refs["lse"][0, 0, 0, place.index] = jnp.concatenate(lse, axis=0)


def tiles_together(plan: Plan) -> int:
    """Tiles that a pass of the loop computes: several where a tile has too little to fill the waits of its chain."""
    vectors = plan.block_heads * (plan.tiles.keys + plan.extra_rows) / 8 * plan.tiles.queries / 128
    return next(n for n in (4, 2, 1) if plan.band_tiles % n == 0 and (n * vectors <= 800 or n == 1))


def tile_logits(
    plan: Plan, scale: float, refs: dict[str, Any], place: Place, keys: list[jax.Array], queries: list[jax.Array]
) -> list[jax.Array]:
    """For each head of the block `[keys, queries]`, in units of log(2), masks and bias included."""
    raw = head_products(plan, keys, queries, refs["k"].dtype)
    with_masks = "bias" in refs and plan.is_uniform
    masks = [] if with_masks else tile_mask(plan, refs, place)
    logits = []
    for head in range(plan.block_heads):
        added = tile_bias(plan, refs, head, place) if "bias" in refs else masks
        if "bias" in refs and not with_masks:
            added = [mask + bias for mask, bias in zip(masks, added, strict=True)]
        if plan.extra:
            queries_here = plan.tiles.queries
            added = [*added, jnp.broadcast_to(refs["extra_mask"][...], (plan.extra_rows, queries_here))]
        logits.append(raw[head] * (scale * LOG2E) + jnp.concatenate(added, axis=0))
    return logits


def tile_mask(plan: Plan, refs: dict[str, Any], place: Place) -> list[jax.Array]:
    """What is added to logits, by runs of keys along x: `[keys along x, queries]` for each (z, y)."""
    queries = plan.tiles.queries
    z_rows, y_rows = (
        [refs[name][place.mask[number], pl.ds(key, 1)] if name in refs else None for key in range(span)]
        for number, (name, span) in enumerate(
            (("masks_z", plan.tiles.axes[0].span), ("masks_y", plan.tiles.axes[1].span))
        )
    )
    x = plan.tiles.axes[2]
    along_x = refs["masks_x"][place.mask[2]] if "masks_x" in refs else jnp.zeros((x.span * x.residues, queries))
    return [_sum(along_x, z_row, y_row) for z_row in z_rows for y_row in y_rows]


def _sum(first: jax.Array, *others: jax.Array | None) -> jax.Array:
    rows = [other for other in others if other is not None]
    return first + functools.reduce(jnp.add, rows) if rows else first


def bias_rows(plan: Plan, head: int, place: Place) -> list[tuple[Any, ...]]:
    """Indices into the spread bias of a block for each (z, y) of a box: `[head, x class, z, y]`."""
    depth, height, _ = (axis.span for axis in plan.tiles.axes)
    first_z, first_y, along_x = place.offset
    return [(head, along_x, first_z + z, first_y + y) for z in range(depth) for y in range(height)]


def tile_bias(plan: Plan, refs: dict[str, Any], head: int, place: Place) -> list[jax.Array]:
    """The bias of a head by runs of keys, like `tile_mask`."""
    return [refs["bias_map"][index] for index in bias_rows(plan, head, place)]


def tile_keys(plan: Plan, refs: dict[str, Any], name: str, extra: str, place: Place) -> list[jax.Array]:
    """The keys (or values) of a tile, extra ones behind them, float32, by part `[keys, lanes]`."""
    rows = key_rows(plan, place)
    parts = []
    for part, (lo, hi) in enumerate(plan.parts):
        found = read_part(refs[name], part, rows, hi - lo)
        if plan.extra:
            more = refs[extra][0, :, pl.ds(lo, hi - lo)].astype(jnp.float32)
            found = jnp.concatenate([found, more], axis=0)
        parts.append(found)
    return parts


def tile_queries(plan: Plan, refs: dict[str, Any], name: str, place: Place) -> list[jax.Array]:
    """What a tile has of a map of queries, by part `[queries, lanes]`, in the map's dtype."""
    rows = query_rows(plan, place)
    if plan.is_direct:
        return [read_block(refs[name], lanes, rows) for lanes in plan.parts]
    dtype = refs[name].dtype
    return [read_part(refs[f"{name}_map"], i, rows, hi - lo).astype(dtype) for i, (lo, hi) in enumerate(plan.parts)]


def write_queries(plan: Plan, refs: dict[str, Any], name: str, value: jax.Array, place: Place) -> None:
    """Writes `[queries, lanes]` of a tile to a map of queries."""
    run = plan.tiles.axes[2].tile
    value = value.astype(refs[name].dtype) if plan.is_direct else value
    for number, (z, y, x) in enumerate(query_rows(plan, place)):
        rows = value[number * run : (number + 1) * run]
        for part, (lo, hi) in enumerate(plan.parts):
            if plan.is_direct:
                refs[name][0, z, y, x, pl.ds(lo, hi - lo)] = rows[:, lo:hi]
            else:
                refs[f"{name}_map"][part, z, y, x, pl.ds(0, hi - lo)] = rows[:, lo:hi]


def head_products(plan: Plan, left: list[jax.Array], right: list[jax.Array], narrow: Any) -> list[jax.Array]:
    """For each head `left_h right_h^T`, `[rows of left, rows of right]` float32.

    Heads that share lanes are one product: the right operand once for each head, with the other heads' lanes zero.
    """
    products: dict[int, jax.Array] = {}
    for (first, end), heads in plan.together:
        one = _joined([part.astype(narrow) for part in left[first:end]])
        other = _joined(right[first:end])
        rows = other.shape[0]
        stacked = jnp.concatenate([only_head(plan, other, first, head).astype(narrow) for head in heads], axis=0)
        product = jax.lax.dot_general(
            one,
            stacked,
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
            precision=product_precision(narrow),
        )
        products |= {head: product[:, i * rows : (i + 1) * rows] for i, head in enumerate(heads)}
    return [products[head] for head in range(plan.block_heads)]


def only_head(plan: Plan, value: jax.Array, first_part: int, head: int) -> jax.Array:
    """The array with the lanes of all other heads zero; lane 0 is that of part `first_part`."""
    lo = head * plan.head_dim - 128 * first_part
    if value.shape[1] == plan.head_dim:
        return value
    lane = jax.lax.broadcasted_iota(jnp.int32, value.shape, 1)
    return jnp.where((lane >= lo) & (lane < lo + plan.head_dim), value, jnp.zeros_like(value))


def head_rows(plan: Plan, turned: list[jax.Array], head: int) -> jax.Array:
    """`[D, ...]` of a head from the parts `[lanes, ...]` of a block."""
    first, end = plan.head_parts(head)
    lo = head * plan.head_dim - 128 * first
    return _joined(turned[first:end], axis=0)[lo : lo + plan.head_dim]


def product_precision(dtype: Any) -> Any:
    """Float32 operands are multiplied as such: the default would round them to bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _joined(parts: list[jax.Array], axis: int = 1) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis)
