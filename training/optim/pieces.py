"""The layers of stacked leaves that an optimizer owns, as leaves of their own.

Frozen layers, or layers with another optimizer, are cut out of a stacked leaf before anything is computed: of
`blocks.[0::1].norm1.scale` [12, C] with the first six layers frozen, `blocks.[6::1].norm1.scale` [6, C] is left. So
frozen layers cost neither moments nor arithmetic, and the optimizer state unrolls to the names of the unrolled model's.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from training.optim.patterns import Shaped, sliced_name


class Piece(NamedTuple):
    """Part of a leaf: the leaf's name and, unless it is all of it, indices along the leading axis."""

    leaf: str
    layers: slice | None


Pieces = dict[str, Piece]


def cut(owned: Mapping[str, np.ndarray]) -> Pieces:
    """Pieces by name that together are the owned layers: {leaf name: bool [] or [L]} -> {piece name: piece}.

    A wholly owned leaf is one piece of the same name, and otherwise each evenly spaced run of layers is one.
    """
    pieces = {}
    for leaf, mask in owned.items():
        if mask.all():
            pieces[leaf] = Piece(leaf, None)
        elif mask.any():
            for layers in _even_runs(np.flatnonzero(mask).tolist()):
                pieces[sliced_name(leaf, layers.start, layers.step)] = Piece(leaf, layers)
    return pieces


def take(flat: Mapping[str, Any], pieces: Pieces) -> dict[str, Any]:
    """The pieces of a flat dictionary of JAX or NumPy arrays whose leading axes are those of the leaves."""
    return {
        name: flat[piece.leaf] if piece.layers is None else flat[piece.leaf][piece.layers]
        for name, piece in pieces.items()
    }


def shapes(params: Mapping[str, Shaped], pieces: Pieces) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of the pieces."""
    return jax.eval_shape(lambda flat: take(flat, pieces), dict(params))


def put(flat: dict[str, Array], values: Mapping[str, Array], pieces: Pieces) -> dict[str, Array]:
    """`flat` with the pieces replaced by `values`."""
    result = dict(flat)
    for name, (leaf, layers) in pieces.items():
        result[leaf] = values[name] if layers is None else result[leaf].at[layers].set(values[name])
    return result


def _even_runs(indices: list[int]) -> Iterator[slice]:
    """Increasing indices as few slices of even step, greedily from the left."""
    while indices:
        step = indices[1] - indices[0] if len(indices) > 1 else 1
        length = len(
            list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(indices, itertools.count(indices[0], step))))
        )
        yield slice(indices[0], indices[length - 1] + 1, step)
        indices = indices[length:]
