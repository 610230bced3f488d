"""Attention rollout (Abnar and Zuidema 2020, arXiv:2005.00928): what reaches each last token from each first one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attn import Grid
from models.core.tap import Site
from models.core.taps import Record, record
from models.core.token_maps import all_rows, real_grids


def rollout(
    model: Any, images: Float[Array, "B Y X I"], *, residual: float = 0.5, layers: Sequence[int] | None = None
) -> Float[Array, "B N M"]:
    """Shares of the first map's tokens in those behind the last attention; rows sum to 1.

    Each attention stands for `(1 - residual) * maps + residual * identity`, with the mean of its maps over heads, and
    these matrices are multiplied from the first layer to the last (sections 3 and 4.1). Where the map gets coarser, a
    place is the mean of those it covers; a token that looks at nothing (class attention leaves all but the class token
    as they are) stays. Maps of windows, blocks, grids and regions are brought to tokens; a layer without maps over
    tokens (a convolution, attention between channels) is left out, and so is what is mixed between stages. Each layer
    on a map of 56 x 56 places takes 40 MB an image.

    Args:
      residual: share of the residual branch, from 0 to 1.
      layers: numbers of the layers that count; all unless given.

    Raises:
      ValueError: the model has no attention whose maps are over tokens.
    """
    return rolled(model, images, residual=residual, layers=layers)[0]


def rolled(
    model: Any, images: Float[Array, "B Y X I"], *, residual: float, layers: Sequence[int] | None
) -> tuple[Float[Array, "B N M"], Grid, Grid]:
    """`rollout`, and the grids that its rows and columns are of."""
    if not 0 <= residual <= 1:
        raise ValueError(f"residual={residual!r}: the share of the residual branch; allowed: 0 to 1")
    tap = _Mixing(residual, record("probs", layers=layers).layers)
    model(images, tap=tap)
    recorded = tap.values
    visits = sorted(
        (layer, number, row) for number, name in enumerate(recorded) for row, layer in enumerate(recorded.layers[name])
    )
    if not visits:
        raise ValueError(f"a {type(model).__name__} has no attention whose maps are over tokens")
    names = list(recorded)
    steps = [
        (recorded.arrays[names[number]][row], *real_grids(recorded.about[names[number]])) for *_, number, row in visits
    ]
    total, before, first = steps[0]
    for mixing, queries, keys in steps[1:]:
        total, before = mixing @ _coarser(total, before, keys), queries
    return total, before, first


class _Mixing(Record):
    """Keeps each attention and its residual as one matrix `[B, N, M]` between the places of the map."""

    def __init__(self, residual: Any, layers: tuple[int, ...] | None):
        super().__init__(("probs",), layers, None)
        self.residual = residual

    def kept(self, site: Site, value: Array) -> Array | None:
        if site.index is None:
            return None
        queries, keys = real_grids(site)
        shares = all_rows(site, value.astype(jnp.float32).mean(-3, keepdims=True))[:, 0]
        sums = shares.sum(-1, keepdims=True)
        identity = _coarser(jnp.eye(keys.tokens)[None], keys, queries)
        mixed = (1 - self.residual) * shares / sums.clip(1e-9) + self.residual * identity
        return jnp.where(sums > 0, mixed, identity)


jax.tree_util.register_pytree_node(
    _Mixing, lambda tap: ((tap.residual,), tap.layers), lambda layers, leaves: _Mixing(leaves[0], layers)
)


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
