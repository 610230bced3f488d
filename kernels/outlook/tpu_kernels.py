"""Outlook attention of windows of 3 x 3 places at every other place, for TPUs (Pallas Mosaic): both directions.

A window's nine by nine weights and its nine places are far too small for the matrix unit, and for tiles of 8 x 128
numbers. So windows lie in the lanes, the channels of a head in the sublanes, and each of the 81 pairs of places is a
product of vectors, with a row of weights repeated over the sublanes.

The map comes as four planes, the places of even and of odd rows and columns, each with one place for every window.
Along an axis a window has its own place of the even plane, its own of the odd one, and that of the window before. So
what windows share is a shift by one lane, or by a row of lanes, and what is unfolded is never in main memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

PLACES = 9
# Of the three places of a window along an axis: the plane, and whether it is that of the window before.
_AXIS = ((1, True), (0, False), (1, False))


def forward(logits: Any, v: Any, *, grid: Sequence[int], scale: float) -> Any:
    """Planes of the output.

    Args:
      logits: `[B, H, I, O, L]`, windows in row-major order, with zeros behind them up to a multiple of 128.
      v: planes `[B, H, 4, D, L]`.
      grid: rows and columns of windows.
    """
    kernel = functools.partial(_forward, scale=scale, grid=grid)
    return _call(kernel, (logits, v), [jax.ShapeDtypeStruct(v.shape, v.dtype)], "outlook_attention_forward")[0]


def backward(logits: Any, v: Any, d_out: Any, *, grid: Sequence[int], scale: float) -> tuple[Any, Any]:
    """Gradients of the logits and of the planes of v."""
    kernel = functools.partial(_backward, scale=scale, grid=grid)
    results = [jax.ShapeDtypeStruct(like.shape, like.dtype) for like in (logits, v)]
    return _call(kernel, (logits, v, d_out), results, "outlook_attention_backward")


def _call(kernel: Any, arguments: Any, results: Any, name: str) -> Any:
    """One step of the grid for each head of each example."""

    def block(array: Any) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, *array.shape[2:]), lambda example, head: (example, head, 0, 0, 0))

    return pl.pallas_call(
        kernel,
        grid=arguments[0].shape[:2],
        in_specs=[block(array) for array in arguments],
        out_specs=[block(array) for array in results],
        out_shape=results,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name=name,
    )(*arguments)


def _forward(logits: Any, v: Any, out: Any, *, scale: float, grid: Sequence[int]) -> None:
    probs = _softmax(logits, scale)
    places = _unfold(v, grid)
    _fold([_sum(probs[i][o : o + 1] * places[i] for i in range(PLACES)) for o in range(PLACES)], out, grid)


def _backward(logits: Any, v: Any, d_out: Any, d_logits: Any, d_v: Any, *, scale: float, grid: Sequence[int]) -> None:
    probs = _softmax(logits, scale)
    places, d_mixed = _unfold(v, grid), _unfold(d_out, grid)
    _fold([_sum(probs[i][o : o + 1] * d_mixed[o] for o in range(PLACES)) for i in range(PLACES)], d_v, grid)
    d_probs = [
        jnp.concatenate([jnp.sum(places[i] * d_mixed[o], axis=0, keepdims=True) for o in range(PLACES)], axis=0)
        for i in range(PLACES)
    ]
    inner = _sum(p * d for p, d in zip(probs, d_probs, strict=True))
    for i in range(PLACES):
        d_logits[0, 0, i] = (scale * probs[i] * (d_probs[i] - inner)).astype(d_logits.dtype)


def _softmax(logits: Any, scale: float) -> list[jax.Array]:
    """Over the places that are mixed: for each its weights `[O, L]`, float32."""
    rows = [scale * logits[0, 0, i].astype(jnp.float32) for i in range(PLACES)]
    largest = functools.reduce(jnp.maximum, rows)
    weights = [jnp.exp(row - largest) for row in rows]
    total = 1 / _sum(weights)
    return [one * total for one in weights]


def _sum(terms: Iterable[jax.Array]) -> jax.Array:
    """Without the zero that Python's begins with."""
    return functools.reduce(jnp.add, terms)


def _unfold(planes: Any, grid: Sequence[int]) -> list[jax.Array]:
    """The places of all windows, `[D, L]` each, float32; zeros outside the map."""
    lane = jax.lax.broadcasted_iota(jnp.int32, planes.shape[3:], 1)
    found = []
    for row, above in _AXIS:
        for column, left in _AXIS:
            x = planes[0, 0, 2 * row + column].astype(jnp.float32)
            x = _from_before(x, grid[1], lane < grid[1]) if above else x
            found.append(_from_before(x, 1, jax.lax.rem(lane, grid[1]) == 0) if left else x)
    return found


def _fold(mixed: list[jax.Array], planes: Any, grid: Sequence[int]) -> None:
    """Transpose of `_unfold`: what the windows have for a place, summed."""
    lane = jax.lax.broadcasted_iota(jnp.int32, planes.shape[3:], 1)
    sums: dict[int, jax.Array] = {}
    for number, x in enumerate(mixed):
        (row, above), (column, left) = _AXIS[number // 3], _AXIS[number % 3]
        x = _from_behind(x, grid[1], lane >= math.prod(grid) - grid[1]) if above else x
        x = _from_behind(x, 1, jax.lax.rem(lane, grid[1]) == grid[1] - 1) if left else x
        plane = 2 * row + column
        sums[plane] = sums[plane] + x if plane in sums else x
    for plane, x in sums.items():
        planes[0, 0, plane] = x.astype(planes.dtype)


def _from_before(x: jax.Array, by: int, first: jax.Array) -> jax.Array:
    """What the window above, or on the left, has; zero in the first row, or column."""
    return jnp.where(first, 0.0, pltpu.roll(x, by, 1))


def _from_behind(x: jax.Array, by: int, last: jax.Array) -> jax.Array:
    """What the window below, or on the right, has; zero in the last row, or column."""
    return jnp.where(last, 0.0, pltpu.roll(x, x.shape[1] - by, 1))
