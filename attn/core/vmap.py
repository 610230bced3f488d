"""`jax.vmap` over attention: the mapped axis becomes part of the batch, or of the heads, so that one kernel runs.

A kernel that JAX maps by itself gains a grid axis, or cannot be mapped. Attention needs neither: examples and heads do
not see each other, so a mapped axis can count as more of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attn.core.shards import Layout

Layouts = Callable[..., tuple[Sequence[Layout | None], Sequence[Layout | None]]]
"""Gives the layouts of the arguments and of the results of a function for its arguments; None for None."""


def folded(
    function: Callable[..., Sequence[jax.Array]],
    arguments: Sequence[Any],
    is_mapped: Sequence[bool],
    layouts: Layouts,
    *,
    keys: int,
) -> tuple[jax.Array, ...]:
    """`jax.vmap(function)(*arguments)` by one call of the function with more examples or more heads.

    The mapped axis goes behind the axis it joins, so that a batch, or heads, that are split over devices stay so. It
    joins the batch, unless there are arrays without one (a table for each head) that are mapped or returned: then it
    joins the heads.

    Args:
      arguments: arrays, or None; the mapped axis is the first of those that have it.
      keys: which argument has the number of key heads. Query heads are `[key heads, group]`, and stay so.
    """
    size = next(array.shape[0] for array, flag in zip(arguments, is_mapped, strict=True) if flag)
    # A shape is all that layouts look at.
    examples = [
        jax.ShapeDtypeStruct(array.shape[1:], array.dtype) if flag else array
        for array, flag in zip(arguments, is_mapped, strict=True)
    ]
    into, out_of = layouts(*examples)
    layout = into[keys]
    assert layout is not None
    # Where heads lie in one axis with their channels, nothing is mapped over them.
    kv_heads = examples[keys].shape[layout.index("heads")] if "heads" in layout else 1
    tables = [flag for flag, layout in zip(is_mapped, into, strict=True) if layout and "batch" not in layout]
    kind = "heads" if any(tables) or any(layout and "batch" not in layout for layout in out_of) else "batch"
    if kind == "heads" and not any(layout and kind in layout for layout in into):
        return _one_by_one(function, arguments, is_mapped)
    arrays = [
        fold(array, flag, layout, kind, size, kv_heads) if layout and kind in layout else array
        for array, flag, layout in zip(arguments, is_mapped, into, strict=True)
    ]
    return tuple(
        unfold(result, layout, kind, size, kv_heads)
        for result, layout in zip(function(*arrays), out_of, strict=True)
        if layout is not None
    )


def _one_by_one(
    function: Callable[..., Sequence[jax.Array]], arguments: Sequence[Any], is_mapped: Sequence[bool]
) -> tuple[jax.Array, ...]:
    """A call for each place of the mapped axis."""
    mapped = [array for array, flag in zip(arguments, is_mapped, strict=True) if flag]

    def call(own: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        these = iter(own)
        rest = zip(arguments, is_mapped, strict=True)
        return tuple(function(*[next(these) if flag else array for array, flag in rest]))

    return jax.lax.map(call, mapped)


def fold(array: jax.Array, is_mapped: bool, layout: Layout, kind: str, size: int, kv_heads: int) -> jax.Array:
    """The mapped axis, the first one (or none: the array is repeated), as part of an axis of this kind."""
    axis = layout.index(kind)
    if not is_mapped:
        array = jnp.broadcast_to(array[None], (size, *array.shape))
    split = _split(array.shape[1:], axis, kind, kv_heads)
    array = jnp.moveaxis(array.reshape(size, *split), 0, axis + 1)
    return array.reshape(*split[:axis], size * split[axis] * split[axis + 1], *split[axis + 2 :])


def unfold(array: jax.Array, layout: Layout, kind: str, size: int, kv_heads: int) -> jax.Array:
    """The opposite of `fold`: the mapped axis is the first."""
    axis = layout.index(kind)
    shape = (*array.shape[:axis], array.shape[axis] // size, *array.shape[axis + 1 :])
    split = _split(shape, axis, kind, kv_heads)
    array = array.reshape(*split[: axis + 1], size, *split[axis + 1 :])
    return jnp.moveaxis(array, axis + 1, 0).reshape(size, *shape)


def _split(shape: Sequence[int], axis: int, kind: str, kv_heads: int) -> tuple[int, ...]:
    """The axis as two: heads as key heads and the queries of each, the batch as itself and 1."""
    outer = kv_heads if kind == "heads" else shape[axis]
    return (*shape[:axis], outer, shape[axis] // outer, *shape[axis + 1 :])
