"""Neighborhood attention on TPUs: the common contract of implementations around the two Pallas kernels.

Arrays come heads last, `[B, *S, H, D]`, which is the packed output of a projection seen with one more axis; the kernels
read it packed, so that neither side is copied. What the kernels do not have is brought to what they have: grouped key
heads are repeated, head dims are padded with zeros to a common multiple of 8.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from kernels.neighborhood import tpu_backward, tpu_forward
from kernels.neighborhood.pattern import Pattern
from kernels.neighborhood.tiles import three_axes
from kernels.neighborhood.tpu_bias import packed_table, unpacked_table
from kernels.neighborhood.tpu_blocks import Blocks
from kernels.neighborhood.tpu_choice import choose
from kernels.neighborhood.tpu_plan import Plan

_DTYPES = ("float32", "bfloat16")


def refuse(q: Any, k: Any, v: Any, bias: Any, extra_keys: Any, extra_values: Any, *, pattern: Pattern) -> str | None:
    """Why these arguments cannot be had here; None if they can."""
    if str(q.dtype) not in _DTYPES:
        return f"dtype {q.dtype}; the kernel takes {' and '.join(_DTYPES)}"
    try:
        for direction in ("forward", "backward"):
            _blocks(direction, q, v, bias, extra_keys, pattern)
    except ValueError as error:
        return str(error)
    return None


def forward(
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    extra_keys: Any,
    extra_values: Any,
    *,
    pattern: Pattern,
    scale: float,
) -> tuple[Any, Any]:
    """Output `[B, *S, H, E]` and logsumexp `[B, *S, H]` float32."""
    blocks = _blocks("forward", q, v, bias, extra_keys, pattern)
    plan = blocks.plan
    out, lse = tpu_forward.forward(
        blocks,
        *(_packed(array, plan, pattern) for array in (q, k, v)),
        extra=_packed_extra(plan, extra_keys, extra_values),
        bias=None if bias is None else packed_table(plan, bias),
        scale=scale,
    )
    return _unpacked(out, q.shape, v.shape[-1], plan), rows_to_map(plan, lse, q.shape[:-1])


def backward(
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    extra_keys: Any,
    extra_values: Any,
    out: Any,
    lse: Any,
    d_out: Any,
    d_lse: Any,
    *,
    pattern: Pattern,
    scale: float,
) -> tuple[Any, ...]:
    """Gradients of q, k, v, bias and the extra keys and values, None for what is None."""
    blocks = _blocks("backward", q, v, bias, extra_keys, pattern)
    plan = blocks.plan
    found = tpu_backward.backward(
        blocks,
        *(_packed(array, plan, pattern) for array in (q, k, v)),
        extra=_packed_extra(plan, extra_keys, extra_values),
        bias=None if bias is None else packed_table(plan, bias),
        lse=map_to_rows(plan, lse),
        d_out=_packed(d_out, plan, pattern),
        d_lse=None if d_lse is None else map_to_rows(plan, d_lse),
        scale=scale,
    )
    d_q = _unpacked(found["d_q"], q.shape, q.shape[-1], plan)
    d_k, d_v = (
        _summed_heads(_unpacked(_summed_bands(plan, found[name]), q.shape, like.shape[-1], plan), like)
        for name, like in (("d_k", k), ("d_v", v))
    )
    d_bias = None
    if bias is not None:
        d_bias = unpacked_table(found["d_bias"].sum(axis=0), bias.shape).astype(bias.dtype)
    d_extra: list[Any] = [None, None]
    if plan.extra:
        for number, (name, like) in enumerate((("d_extra_keys", extra_keys), ("d_extra_values", extra_values))):
            rows = found[name].sum(axis=1)[:, : plan.extra]
            rows = rows.reshape(*rows.shape[:2], plan.heads, plan.head_dim)[..., : like.shape[-1]]
            d_extra[number] = _summed_heads(rows, like)
    return d_q, d_k, d_v, d_bias, *d_extra


def rows_to_map(plan: Plan, rows: Any, shape: tuple[int, ...]) -> Any:
    """One number for each query and head: from `Blocks.rows_shape` to `[B, *S, H]`."""
    split, order, padded, lengths = _orders(plan)
    steps, heads = rows.shape[0], plan.heads
    grid = rows.reshape(steps, *split).transpose(0, *(1 + axis for axis in order)).reshape(steps, *padded, heads)
    grid = grid[:, *(slice(length) for length in lengths)]
    # The examples of a step are next to the heads.
    return jnp.moveaxis(grid.reshape(steps, -1, plan.examples, heads), 2, 1).reshape(shape)


def map_to_rows(plan: Plan, values: Any) -> Any:
    """The reverse of `rows_to_map`; zero for queries that do not exist."""
    split, order, padded, lengths = _orders(plan)
    grid = jnp.moveaxis(values.reshape(-1, plan.examples, values[0].size // plan.heads, plan.heads), 1, 2)
    steps = grid.shape[0]
    grid = grid.reshape(steps, *lengths, plan.heads)
    grid = jnp.pad(grid, [(0, 0), *((0, full - n) for full, n in zip(padded, lengths, strict=True)), (0, 0)])
    back = [order.index(axis) for axis in range(len(order))]
    grid = grid.reshape(steps, *(split[axis] for axis in order)).transpose(0, *(1 + axis for axis in back))
    return grid.reshape(steps, plan.blocks, plan.bands, plan.band_tiles, plan.block_heads, plan.tiles.queries)


def _orders(plan: Plan) -> tuple[list[int], list[int], list[int], list[int]]:
    """How rows by tile split into axes, the order of these in a map, and extents of the map: padded, and as they are.

    An axis of blocks counts as three, since every block of it is padded: block, member, group of the dilation.
    """
    axes = [layout.tiles for layout in plan.layouts]
    split = [plan.blocks, *(axis.bands for axis in axes)]
    for axis in axes:
        groups = axis.group_count // axis.residues
        if axis.by_block:
            outer = axis.group_count // axis.step if axis.step > 1 else groups
        else:
            outer = 1
        split += [outer, groups // outer, axis.along // axis.bands]
    split += [plan.block_heads, axes[0].tile, axes[1].tile, axes[2].residues, axes[2].tile]
    # Token = (block, (band, tile), member), then the group: its block in the order of tiles, then its place in that.
    order = [4, 1, 6, 14, 5, 7, 2, 9, 15, 8, 10, 3, 12, 17, 11, 16, 0, 13]
    padded = [axis.group_count * axis.along * axis.tile for axis in axes]
    lengths = [axis.axis.length for axis in axes]
    if (x := axes[2]).by_block:
        padded[2:] = [x.group_count // x.step, x.along * x.tile, x.step]
        lengths[2:] = [x.group_count // x.step, x.axis.window, x.step]
        if x.step == 1:
            order[10:16] = [10, 16, 3, 12, 17, 11]
    return split, order, padded, lengths


def _blocks(direction: str, q: Any, v: Any, bias: Any, extra_keys: Any, pattern: Pattern) -> Blocks:
    return choose(
        pattern,
        q.shape[-2],
        -(-max(q.shape[-1], v.shape[-1]) // 8) * 8,
        q.dtype,
        direction,
        batch=q.shape[0],
        bias=bias is not None,
        extra=0 if extra_keys is None else extra_keys.shape[1],
    )


def _packed(array: Any, plan: Plan, pattern: Pattern) -> Any:
    """`[B, Z, Y, X, H * D]`, grouped heads repeated, the head dim padded; examples before them if side by side."""
    lengths = (axis.length for axis in three_axes(pattern))
    packed = _wide(array, plan).reshape(array.shape[0], *lengths, plan.heads * plan.head_dim)
    return packed if plan.examples == 1 else jnp.moveaxis(packed, 0, 3)


def _packed_extra(plan: Plan, extra_keys: Any, extra_values: Any) -> Any:
    """`[B, rows, H * D]` of both, or None."""
    if extra_keys is None:
        return None
    missing = ((0, 0), (0, plan.extra_rows - plan.extra), (0, 0))
    wide = (_wide(array, plan).reshape(*array.shape[:2], -1) for array in (extra_keys, extra_values))
    return tuple(jnp.pad(array, missing) for array in wide)


def _wide(array: Any, plan: Plan) -> Any:
    """`[..., H, D]` with all heads and the head dim of the plan."""
    if array.shape[-2] != plan.heads:
        array = jnp.repeat(array, plan.heads // array.shape[-2], axis=-2)
    if array.shape[-1] != plan.head_dim:
        array = jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, plan.head_dim - array.shape[-1])])
    return array


def _unpacked(array: Any, shape: tuple[int, ...], width: int, plan: Plan) -> Any:
    array = array if plan.examples == 1 else jnp.moveaxis(array, 3, 0)
    return array.reshape(*shape[:-2], plan.heads, plan.head_dim)[..., :width]


def _summed_heads(gradient: Any, like: Any) -> Any:
    """Sums the gradients of repeated heads."""
    heads = like.shape[-2]
    if gradient.shape[-2] != heads:
        split = (*gradient.shape[:-2], heads, gradient.shape[-2] // heads, gradient.shape[-1])
        gradient = gradient.reshape(split).astype(jnp.float32).sum(axis=-2)
    return gradient.astype(like.dtype)


def _summed_bands(plan: Plan, parts: Any) -> Any:
    """`[B, Z, Y, X, lanes]` from the overlapping blocks of the bands."""
    if plan.bands == 1:
        return parts[:, 0] if plan.examples == 1 else parts
    number = next(i for i, layout in enumerate(plan.layouts) if layout.tiles.bands > 1)
    layout = plan.layouts[number]
    lengths = [one.tiles.axis.length for one in plan.layouts]
    total = jnp.zeros((parts.shape[0], *lengths, parts.shape[-1]), jnp.float32)
    for band, first in enumerate(layout.first_key):
        where = [slice(None)] * total.ndim
        where[1 + number] = slice(int(first), int(first) + layout.keys)
        total = total.at[tuple(where)].add(parts[:, band])
    return total
