"""Outlook attention on TPUs: the common contract of implementations around the two Pallas kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.outlook import tpu_kernels

_DTYPES = ("float32", "bfloat16")
_LANES = 128
_ROWS = 16
"""Channels that a head has a multiple of: rows of a vector of a narrow type."""
_CHANNELS, _WINDOWS = 128, 1024
"""Of a head, at most, or as many windows fewer as it has more channels: both are on the chip, written out one vector
after the other."""


def refuse(logits: Any, v: Any, *, window: int, stride: int) -> str | None:
    """Why these arguments cannot be had here; None if they can."""
    if (window, stride) != (3, 2):
        return f"window={window}, stride={stride}; the kernel takes 3 and 2"
    for array in (logits, v):
        if str(array.dtype) not in _DTYPES:
            return f"dtype {array.dtype}; the kernel takes {' and '.join(_DTYPES)}"
    if v.shape[-1] % _ROWS:
        return f"head dim {v.shape[-1]}; the kernel takes multiples of {_ROWS}"
    windows, channels = math.prod(logits.shape[1:3]), v.shape[-1]
    if windows * max(channels, _CHANNELS) > _WINDOWS * _CHANNELS:
        return f"{windows} windows of {channels} channels; the kernel takes up to {_WINDOWS} of {_CHANNELS}"
    return None


def forward(
    logits: Float[Array, "B V U H O I"], v: Float[Array, "B Y X H D"], *, window: int, stride: int, scale: float
) -> tuple[Float[Array, "B Y X H D"]]:
    """The output."""
    grid = logits.shape[1:3]
    out = tpu_kernels.forward(_by_pair(logits), _planes(v, grid), grid=grid, scale=scale)
    return (_map(out, grid, v.shape),)


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
    grid = logits.shape[1:3]
    d_logits, d_v = tpu_kernels.backward(
        _by_pair(logits), _planes(v, grid), _planes(d_out, grid), grid=grid, scale=scale
    )
    windows = d_logits[..., : math.prod(grid)].reshape(*d_logits.shape[:4], *grid)
    return windows.transpose(0, 4, 5, 1, 3, 2), _map(d_v, grid, v.shape)


def _by_pair(logits: Float[Array, "B V U H O I"]) -> Float[Array, "B H I O L"]:
    """Windows in the lanes."""
    x = logits.transpose(0, 3, 5, 4, 1, 2)
    return _lanes(x.reshape(*x.shape[:4], -1))


def _planes(x: Float[Array, "B Y X H D"], grid: Sequence[int]) -> Float[Array, "B H 4 D L"]:
    """Places of even and of odd rows and columns, each by the number of the window whose centre or corner they are."""
    batch, *shape, heads, depth = x.shape
    # With features in one axis: a TPU stores the last two in tiles, and heads would fill a part of each.
    x = x.reshape(batch, *shape, heads * depth)
    x = jnp.pad(x, [(0, 0), *((0, 2 * count - side) for count, side in zip(grid, shape, strict=True)), (0, 0)])
    x = x.reshape(batch, grid[0], 2, grid[1], 2, heads * depth).transpose(0, 2, 4, 5, 1, 3)
    x = x.reshape(batch, 4, heads, depth, math.prod(grid)).swapaxes(1, 2)
    return _lanes(x)


def _map(planes: Float[Array, "B H 4 D L"], grid: Sequence[int], shape: Sequence[int]) -> Float[Array, "B Y X H D"]:
    """Opposite of `_planes`."""
    batch, rows, columns, heads, depth = shape
    x = planes[..., : math.prod(grid)].swapaxes(1, 2).reshape(batch, 2, 2, heads * depth, *grid)
    x = x.transpose(0, 4, 1, 5, 2, 3).reshape(batch, 2 * grid[0], 2 * grid[1], heads * depth)
    return x[:, :rows, :columns].reshape(shape)


def _lanes(x: Float[Array, "*B N"]) -> Float[Array, "*B L"]:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % _LANES)])
