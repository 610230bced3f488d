"""Attention rollout (Abnar and Zuidema 2020, arXiv:2005.00928): what reaches each last token from each first one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attn import Grid
from models.core.tap import Site, over_tokens
from models.core.taps import record
from models.core.watch import Recorded


def rollout(
    model: Any, images: Float[Array, "B Y X I"], *, residual: float = 0.5, layers: Sequence[int] | None = None
) -> Float[Array, "B N M"]:
    """Shares of the first map's tokens in those behind the last attention; rows sum to 1.

    Each attention stands for `(1 - residual) * maps + residual * identity`, with the mean of its maps over heads, and
    these matrices are multiplied from the first layer to the last (sections 3 and 4.1). Where the map gets coarser, a
    place is the mean of those it covers. Maps of windows, blocks and grids are brought to tokens; a layer without maps
    (a convolution) is left out, and so is what is mixed between stages. An image of 224 x 224 pixels takes 40 MB with
    a first map of 56 x 56 places.

    Args:
      residual: share of the residual branch.
      layers: numbers of the layers that count; all unless given.

    Raises:
      ValueError: the model has no attention whose maps are over tokens.
    """
    tap = record("probs", layers=layers)
    model(images, tap=tap)
    return rolled(tap.values, residual=residual)


def rolled(recorded: Recorded, *, residual: float = 0.5) -> Float[Array, "B N M"]:
    """The same of maps that `record("probs")` gave."""
    names = list(recorded)
    visits = sorted(
        (layer, number, row)
        for number, name in enumerate(names)
        for row, layer in enumerate(recorded.layers[name])
        if recorded.about[name].index is not None
    )
    if not visits:
        raise ValueError(f"nothing that was recorded is a map over tokens: {', '.join(names)}")
    total: Array | None = None
    before: Grid | None = None
    for _, number, row in visits:
        site = recorded.about[names[number]]
        shares, queries, keys = _shares(site, recorded.arrays[names[number]][row], residual)
        if total is None or before is None:
            total = shares
        else:
            total = shares @ _coarser(total, before, keys)
        before = queries
    assert total is not None
    return total


def _shares(site: Site, maps: Array, residual: float) -> tuple[Float[Array, "B N M"], Grid, Grid]:
    """An attention and its residual as one matrix between the places of the map, and the grids of both sides."""
    assert site.index is not None
    assert site.grid is not None
    mean = over_tokens(maps.mean(-3, keepdims=True), site.index)[:, 0]
    (queries, keys), real = site.index.grids, site.grid
    # Where the map was padded, the padding is no place of it.
    stride = [-(-a // b) for a, b in zip(keys.shape, queries.shape, strict=True)]
    smaller = Grid(tuple(-(-side // by) for side, by in zip(real.shape, stride, strict=True)), real.prefix)
    mean = mean[:, _inside(queries, smaller)][:, :, _inside(keys, real)]
    mean = mean / mean.sum(-1, keepdims=True).clip(1e-9)
    identity = _coarser(jnp.eye(real.tokens)[None], real, smaller)
    return (1 - residual) * mean + residual * identity, smaller, real


def _inside(larger: Grid, grid: Grid) -> np.ndarray:
    """Numbers of the tokens of a grid in a larger one with rows and columns behind it."""
    places = np.arange(larger.prefix, larger.tokens).reshape(larger.shape)
    kept = places[tuple(slice(0, side) for side in grid.shape)].reshape(-1)
    return np.concatenate([np.arange(grid.prefix), kept])


def _coarser(rows: Float[Array, "B N M"], grid: Grid, smaller: Grid) -> Float[Array, "B K M"]:
    """Rows of a grid as means for the places of a coarser one; prefix tokens that there are in both stay, and one that
    is new has the mean of all.
    """
    if grid == smaller:
        return rows
    axes = zip(grid.shape, smaller.shape, strict=True)
    of_axis = [np.arange(many) * few // many for many, few in axes]
    cell = np.ravel_multi_index(np.meshgrid(*of_axis, indexing="ij"), smaller.shape).reshape(-1)
    means = (cell[None, :] == np.arange(smaller.places)[:, None]).astype(np.float32)
    means = means / means.sum(1, keepdims=True).clip(1)
    matrix = np.zeros((smaller.tokens, grid.tokens), np.float32)
    matrix[smaller.prefix :, grid.prefix :] = means
    for token in range(smaller.prefix):
        if token < grid.prefix:
            matrix[token, token] = 1
        else:
            matrix[token] = 1 / grid.tokens
    return jnp.asarray(matrix) @ rows
