"""Fewer keys in each region of a map, by pooling inside the regions (arXiv:2303.08810, official code)."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

POOLS: dict[str, tuple[Callable[..., Array], bool]] = {
    "average": (jnp.mean, False),
    "max": (jnp.max, False),
    "adaptive_average": (jnp.mean, True),
    "adaptive_max": (jnp.max, True),
}
"""Name -> (mean or maximum, whether the size counts the results of a region or the places of each)."""


def pool_regions(
    x: Float[Array, "B Y X *F"], regions: tuple[int, int], *, kind: str, size: int
) -> Float[Array, "B V U *F"]:
    """A map of the same regions, each pooled to fewer places.

    Args:
      regions: rows and columns of regions; they divide the map.
      kind: `"average"` or `"max"` of squares of `size` places, what is left over at the right and at the bottom of a
        region unused; `"adaptive_average"` or `"adaptive_max"` to `size` by `size` places, as PyTorch cuts them: part i
        of n places in m parts is from `floor(i n / m)` to `ceil((i + 1) n / m)`.

    Raises:
      ValueError: another kind; a size below 1, or larger than a region.
    """
    if kind not in POOLS:
        raise ValueError(f"pooling {kind!r} of keys; allowed: {', '.join(POOLS)}")
    reduce, adaptive = POOLS[kind]
    batch, *sides = x.shape[:3]
    features = x.shape[3:]
    for axis, count in enumerate(regions):
        length = sides[axis] // count
        if size < 1 or (size > length and not adaptive):
            raise ValueError(f"pooling {kind!r} of size {size} in regions of {length} places; allowed: 1 to {length}")
        parts = _parts(length, size) if adaptive else [(at, at + size) for at in range(0, length - size + 1, size)]
        # The axis apart from what is before it and behind it, by region.
        split = x.reshape(-1, count, length, *x.shape[2 + axis :])
        x = jnp.stack([reduce(split[:, :, begin:end], axis=2) for begin, end in parts], axis=2)
        sides[axis] = count * len(parts)
        x = x.reshape(batch, *sides, *features)
    return x


def _parts(length: int, count: int) -> list[tuple[int, int]]:
    return [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]
