"""Maps cut into windows, blocks of neighbouring places or grids of places spread over the map, and put together."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Shaped


def to_windows(x: Shaped[Array, "B Y X *F"], window: Sequence[int], *, grid: bool = False) -> Shaped[Array, "G N *F"]:
    """The windows of all examples one after the other, places of each in row-major order."""
    batch, height, width, *features = x.shape
    rows, columns = window
    if grid:
        x = x.reshape(batch, rows, height // rows, columns, width // columns, *features)
        x = jnp.moveaxis(x, (2, 4), (1, 2))
    else:
        x = x.reshape(batch, height // rows, rows, width // columns, columns, *features)
        x = jnp.moveaxis(x, 3, 2)
    return x.reshape(-1, rows * columns, *features)


def from_windows(
    x: Shaped[Array, "G N *F"], shape: Sequence[int], window: Sequence[int], *, grid: bool = False
) -> Shaped[Array, "B Y X *F"]:
    """Inverse of `to_windows` for maps of `shape`."""
    (height, width), (rows, columns) = shape, window
    down, right = height // rows, width // columns
    x = x.reshape(-1, down, right, rows, columns, *x.shape[2:])
    x = jnp.moveaxis(x, (1, 2), (2, 4)) if grid else jnp.moveaxis(x, 2, 3)
    return x.reshape(x.shape[0], height, width, *x.shape[5:])
