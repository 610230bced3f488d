"""Maps made larger by zeros, for windows and patches that have to fit, and cut back."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from attn import Grid


def padded(x: Float[Array, "B N C"], grid: Grid, larger: Grid) -> Float[Array, "B M C"]:
    """Zeros on the right and at the bottom of the map; prefix tokens stay."""
    if larger == grid:
        return x
    places = x[:, grid.prefix :].reshape(x.shape[0], *grid.shape, -1)
    rest = [(0, after - before) for before, after in zip(grid.shape, larger.shape, strict=True)]
    places = jnp.pad(places, [(0, 0), *rest, (0, 0)]).reshape(x.shape[0], larger.places, -1)
    return jnp.concatenate([x[:, : grid.prefix], places], axis=1)


def cropped(x: Float[Array, "B M C"], larger: Grid, grid: Grid) -> Float[Array, "B N C"]:
    """Inverse of `padded`."""
    if larger == grid:
        return x
    places = x[:, grid.prefix :].reshape(x.shape[0], *larger.shape, -1)
    places = places[(slice(None), *map(slice, grid.shape))].reshape(x.shape[0], grid.places, -1)
    return jnp.concatenate([x[:, : grid.prefix], places], axis=1)


def to_multiple(x: Float[Array, "B Y X C"], sides: Sequence[int]) -> Float[Array, "B V U C"]:
    """Zeros on the right and at the bottom, up to a multiple of `sides`."""
    rest = [-size % side for size, side in zip(x.shape[1:3], sides, strict=True)]
    return jnp.pad(x, [(0, 0), (0, rest[0]), (0, rest[1]), (0, 0)]) if any(rest) else x
