"""Maps of windows, blocks and regions as maps between the places of the image that there are, without padding.

These run inside of a call, where a tap is told which tokens a map is for (`Site.index`), even if that depends on the
images (regions that are routed to) or on the layer (windows that are shifted in every other one).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attn import Grid
from models.core.tap import Site, TokenIndex, over_tokens


def real_grids(site: Site) -> tuple[Grid, Grid]:
    """Where queries and keys of a map sit, without places that a map was padded by; queries may be on a coarser grid.

    Raises:
      ValueError: the site is no map over tokens.
    """
    if site.grids is None or site.grid is None:
        raise ValueError(f"site {site.full} is no map over tokens; its axes are {', '.join(site.axes)}")
    queries, keys = site.grids
    if len(site.grid.shape) != len(keys.shape):
        return queries, keys  # another stream, which has a grid of its own
    stride = [-(-many // few) for many, few in zip(keys.shape, queries.shape, strict=True)]
    coarse = tuple(-(-side // by) for side, by in zip(site.grid.shape, stride, strict=True))
    return Grid(coarse, queries.prefix), site.grid


def inside(larger: Grid, grid: Grid) -> np.ndarray:
    """Numbers of the tokens of a grid in a larger one, with rows and columns behind it."""
    places = np.arange(larger.prefix, larger.tokens).reshape(larger.shape)
    kept = places[tuple(slice(0, side) for side in grid.shape)].reshape(-1)
    return np.concatenate([np.arange(grid.prefix), kept])


def all_rows(site: Site, value: Float[Array, "B ..."]) -> Float[Array, "B H N M"]:
    """What every query looks at; zero for a query that has no map."""
    assert site.grids is not None
    (queries, keys), (rows, columns) = site.grids, real_grids(site)
    whole = site.to_tokens(value)
    whole = whole if queries == rows else whole[:, :, inside(queries, rows)]
    return whole if keys == columns else whole[:, :, :, inside(keys, columns)]


def mean_row(site: Site, value: Float[Array, "B ..."], weights: Float[Array, " N"]) -> Float[Array, "B H M"]:
    """What some queries look at, their weighted mean. Only that one row is brought to tokens.

    A query that several windows hold (outlook attention) counts with the mean of its windows.

    Args:
      weights: of the queries, prefix tokens first; those without a map have to have none.
    """
    index = site.index
    assert index is not None
    (queries, keys), (rows, columns) = index.grids, real_grids(site)
    numbers = np.full(queries.tokens + 1, -1)  # the last one is what -1, no token, finds
    numbers[inside(queries, rows)] = np.arange(rows.tokens)
    held = numbers[np.asarray(index.queries)]
    times = np.bincount(held[held >= 0], minlength=rows.tokens).clip(1)
    each = jnp.where(held < 0, 0, (weights / times)[held])
    row = jnp.einsum("b...hnm,...n->b...hm", value.astype(jnp.float32), each)
    one = TokenIndex(np.zeros((*held.shape[:-1], 1), int), index.keys, (Grid((1,)), keys))
    found = over_tokens(row[..., None, :], one)[:, :, 0]
    return found if keys == columns else found[..., inside(keys, columns)]


def queries_with_maps(site: Site) -> np.ndarray:
    """Which tokens of the grid of queries have a map, as booleans: all, or with class attention the first alone."""
    assert site.index is not None
    numbers = np.asarray(site.index.queries)
    there = np.zeros(site.index.grids[0].tokens, bool)
    there[numbers[numbers >= 0]] = True
    return there[inside(site.index.grids[0], real_grids(site)[0])]
