"""Outlook attention by the compiler: takes every window and stride, dropout, and edits."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from attn.core.numerics import Edit, dropped, edited, product, softmax


def plain(
    logits: Float[Array, "B V U H O I"],
    v: Float[Array, "B Y X H D"],
    *,
    window: int,
    stride: int,
    scale: float | Array,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    edit: Edit | None = None,
) -> tuple[Float[Array, "B Y X H D"]]:
    """Arguments as in `outlook_attention`."""
    logits = edited(edit, "logits", logits.astype(jnp.float32) * scale)
    probs = dropped(edited(edit, "probs", softmax(logits, None)), dropout, key)
    # Windows that overlap are summed before anything is rounded.
    mixed = product("bvuhoi,bvuhid->bvuhod", probs.astype(v.dtype), _unfold(v, window, stride))
    return (_fold(mixed, v.shape[1:3], window, stride).astype(v.dtype),)


def forward(
    logits: Float[Array, "B V U H O I"], v: Float[Array, "B Y X H D"], *, window: int, stride: int, scale: float
) -> tuple[Float[Array, "B Y X H D"]]:
    """The output, for a backward pass that keeps no weights."""
    return plain(logits, v, window=window, stride=stride, scale=scale)


def backward(
    logits: Float[Array, "B V U H O I"],
    v: Float[Array, "B Y X H D"],
    d_out: Float[Array, "B Y X H D"],
    *,
    window: int,
    stride: int,
    scale: float,
) -> tuple[Float[Array, "B V U H O I"], Float[Array, "B Y X H D"]]:
    """Gradients of logits and values; weights are computed again."""

    def again(logits: Array, v: Array) -> Array:
        return plain(logits, v, window=window, stride=stride, scale=scale)[0]

    return jax.vjp(again, logits, v)[1](d_out)


# The map with its zeros is cut into cells of `stride` places; a window has the first `window` places from its own cell
# on. Rows and columns one after the other take slices and sums of whole cells: no gather, and no zeros in between.


def _unfold(v: Float[Array, "B Y X H D"], window: int, stride: int) -> Float[Array, "B V U H I D"]:
    """The places of every window, zeros outside the map."""
    v = _windows(_windows(v, 2, window, stride), 1, window, stride)  # [B, V, rows, U, columns, H, D]
    v = v.transpose(0, 1, 3, 5, 2, 4, 6)
    return v.reshape(*v.shape[:4], window**2, v.shape[-1])


def _fold(y: Float[Array, "B V U H O D"], shape: Sequence[int], window: int, stride: int) -> Float[Array, "B Y X H D"]:
    """Transpose of `_unfold`: sums at every place what the windows have there."""
    y = y.reshape(*y.shape[:4], window, window, y.shape[-1]).transpose(0, 1, 4, 2, 5, 3, 6)
    return _overlaid(_overlaid(y, 3, shape[1], window, stride), 1, shape[0], window, stride)


def _windows(x: Array, axis: int, window: int, stride: int) -> Array:
    """Axis of places to axes (window, place inside the window)."""
    count, reach = -(-x.shape[axis] // stride), (window - 1) // stride
    around = [(0, 0)] * x.ndim
    around[axis] = (window // 2, (count + reach) * stride - x.shape[axis] - window // 2)
    x = jnp.pad(x, around)
    cells = x.reshape(*x.shape[:axis], count + reach, stride, *x.shape[axis + 1 :])

    def place(number: int) -> Array:
        own = jax.lax.slice_in_dim(cells, number // stride, number // stride + count, axis=axis)
        return jax.lax.index_in_dim(own, number % stride, axis + 1, keepdims=False)

    return jnp.stack([place(number) for number in range(window)], axis + 1)


def _overlaid(y: Array, axis: int, length: int, window: int, stride: int) -> Array:
    """Axes (window, place inside the window) to an axis of `length` places."""
    reach = (window - 1) // stride

    def place(number: int) -> Array:
        around = [(0, 0)] * (y.ndim - 1)
        around[axis] = (number // stride, reach - number // stride)
        return jnp.pad(jax.lax.index_in_dim(y, number, axis + 1, keepdims=False), around)

    sums = [sum(map(place, range(first + stride, window, stride)), start=place(first)) for first in range(stride)]
    cells = jnp.stack(sums, axis + 1)
    places = cells.reshape(*cells.shape[:axis], -1, *cells.shape[axis + 2 :])
    return jax.lax.slice_in_dim(places, window // 2, window // 2 + length, axis=axis)
