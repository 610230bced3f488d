"""Attention maps: queries chosen on a map by their coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from attn.core.arguments import is_traced


def check_numbers(what: str, numbers: Any, count: int) -> Int[Array, " Q"]:
    """Numbers of some of `count` things (windows, blocks, channels), as an array.

    Raises:
      ValueError: not such integers, or, where they are known, one that there is not.
    """
    if not hasattr(numbers, "dtype"):
        numbers = np.asarray(numbers)
    if numbers.ndim != 1 or not jnp.issubdtype(numbers.dtype, jnp.integer):
        raise ValueError(f"{what}s {numbers.dtype}{list(numbers.shape)}: must be integers, a number for each {what}")
    if not is_traced(numbers) and (wrong := [int(one) for one in np.asarray(numbers) if not 0 <= one < count]):
        raise ValueError(f"{what} {wrong[0]}: there are {count}, 0 to {count - 1}")
    return jnp.asarray(numbers)


def check_lse(lse: Any, shape: Sequence[int]) -> None:
    """ValueError for a logsumexp that is not that of queries of this shape."""
    if tuple(lse.shape) != tuple(shape):
        raise ValueError(f"lse {tuple(lse.shape)}: must be {tuple(shape)}, one number for each query and head")


def check_places(places: Any, shape: Sequence[int]) -> tuple[Int[Array, " Q"], ...]:
    """Coordinates of places of a map along each axis, from rows `[Q, axes]`.

    Raises:
      ValueError: not such integers, or, where the numbers are known, a place that is not on the map.
    """
    rank = len(shape)
    if not hasattr(places, "dtype"):
        places = np.asarray(places)
    if places.ndim != 2 or places.shape[1] != rank or not jnp.issubdtype(places.dtype, jnp.integer):
        raise ValueError(
            f"queries {places.dtype}{list(places.shape)}: must be integers [queries, {rank}], coordinates on the map"
        )
    if not is_traced(places):
        known = np.asarray(places)
        outside = ~((known >= 0) & (known < tuple(shape))).all(1)
        if outside.any():
            raise ValueError(f"query {known[outside][0].tolist()} is not on the map {tuple(shape)}")
    return tuple(jnp.asarray(places).T)
