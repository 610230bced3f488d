"""Outlook attention: the centre of a window says, without keys, how the places of the window are mixed (VOLO).

Yuan et al. 2021, arXiv:2106.13112, section 3.1 and algorithm 1.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from attn.dense import Hook
from attn.dense_xla import dropped


def outlook_attention(
    logits: Float[Array, "B V U H O I"],
    v: Float[Array, "B Y X H D"],
    *,
    window: int = 3,
    stride: int = 2,
    scale: float | None = None,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    hook: Hook | None = None,
    layer: Any = None,
) -> Float[Array, "B Y X H D"]:
    """Every window mixes its own places; where windows overlap, what they give is summed.

    Windows stand at every `stride`-th row and column, `V = ceil(Y / stride)` by `U = ceil(X / stride)`, the first one
    centred on the first place. With `o` and `i` places of a window in row-major order and `v` zero outside the map,

        out[p] = sum over windows w, and o with w + o = p, of sum_i softmax(scale * logits[w, :, o, :])_i v[w + i].

    The sum is not divided by the number of windows, and the zeros around the map have their share of the softmax. What
    windows give outside the map is dropped.

    Args:
      logits: of each window, for every output place the weights of all input places; `O = I = window ** 2`.
      window: places along each axis, odd. stride: between windows, at most `window`, so that every place is in one.
      scale: of the logits; `D ** -0.5` unless given.
      dropout: share of probabilities set to zero (the rest scaled up); needs `key`.
      hook: may edit `"v"` and `"heads"` `[B, Y * X, H, D]`, `"logits"` (scaled) and `"probs"` `[B, V, U, H, O, I]`.
      layer: handed to the hook.

    The softmax runs in float32 whatever the inputs are; the result has the dtype of `v`.

    Raises:
      ValueError: a window that is even or shorter than the stride, or logits that are not those of its windows.
    """
    check_windows(window, stride)
    batch, height, width, heads, depth = v.shape
    expected = (batch, -(-height // stride), -(-width // stride), heads, window**2, window**2)
    if logits.shape != expected:
        raise ValueError(f"logits of shape {logits.shape}: for values of shape {v.shape} they are {expected}")

    def edit(site: str, value: Array) -> Array:
        return value if hook is None else hook(site, value, layer)

    v = edit("v", v.reshape(batch, -1, heads, depth)).reshape(v.shape)
    logits = edit("logits", logits.astype(jnp.float32) * (depth**-0.5 if scale is None else scale))
    probs = edit("probs", jax.nn.softmax(logits, axis=-1))
    probs = dropped(probs, dropout, key)
    mixed = jnp.einsum("bvuhoi,bvuhid->bvuhod", probs.astype(v.dtype), _unfold(v, window, stride))
    out = _fold(mixed, (height, width), window, stride)
    return edit("heads", out.reshape(batch, -1, heads, depth)).reshape(out.shape)


def check_windows(window: int, stride: int) -> None:
    """ValueError for windows without a centre, or so far apart that some places are in none."""
    if window % 2 == 0 or not 0 < stride <= window:
        raise ValueError(f"window={window}, stride={stride}; allowed: an odd window and a stride of 1 to the window")


def outlook_centres(x: Float[Array, "B Y X C"], *, stride: int = 2) -> Float[Array, "B V U C"]:
    """What the logits are computed from: means over blocks of `stride` by `stride` places (arXiv:2106.13112, section
    3.1). The last blocks of a map that `stride` does not divide are means of the places that there are.
    """
    batch, height, width, channels = x.shape
    rows, columns = -(-height // stride), -(-width // stride)
    x = jnp.pad(x, [(0, 0), (0, rows * stride - height), (0, columns * stride - width), (0, 0)])
    sums = x.reshape(batch, rows, stride, columns, stride, channels).sum((2, 4))
    down, across = (np.minimum(stride, n - stride * np.arange(-(-n // stride))) for n in (height, width))
    return sums / (down[:, None] * across)[..., None].astype(sums.dtype)


# The map with its zeros is cut into cells of `stride` places; a window has the first `window` places from its own cell
# on. Rows and columns one after the other take slices and sums of whole cells: no gather, and no zeros in between.


def _unfold(v: Float[Array, "B Y X H D"], window: int, stride: int) -> Float[Array, "B V U H I D"]:
    """The places of every window, zeros outside the map."""
    v = _windows(_windows(v, 2, window, stride), 1, window, stride)  # [B, V, rows, U, columns, H, D]
    v = v.transpose(0, 1, 3, 5, 2, 4, 6)
    return v.reshape(*v.shape[:4], window**2, v.shape[-1])


def _fold(
    y: Float[Array, "B V U H O D"], shape: tuple[int, int], window: int, stride: int
) -> Float[Array, "B Y X H D"]:
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
