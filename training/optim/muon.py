"""Muon for flat dictionaries with stacked leaves: which leaves it takes, as which matrices, and the transformation.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024, kellerjordan.github.io/posts/muon), with
the momentum of its code (github.com/KellerJordan/Muon, `muon_update`): `m = lerp(m, g, 1 - beta)`, then, with Nesterov,
`lerp(g, m, beta)` is made orthogonal by five steps of the quintic Newton-Schulz iteration. The bias of m is not
corrected; optax does, so that its look-ahead differs in the first steps. The update scale is that of Liu et al., "Muon
is Scalable for LLM Training" (arXiv:2502.16982, equation 4), so that AdamW's learning rate and decay serve.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import optax
from jaxtyping import Array

from training.optim.patterns import Shaped, stacked, unrolled_shape

# Modules whose kernel is several matrices side by side along the output axis, and how many.
FUSED = {"qkv": 3, "kv": 2}

# Liu et al.: 0.2 is the root mean square of AdamW's updates in practice.
UPDATE_RMS = 0.2

_IN_BLOCK = re.compile(r"(?:^|\.)blocks\.(?:\d+|\[\d+::\d+\])\.")


class State(NamedTuple):
    """Momentum by parameter name, in the shapes of the parameters."""

    mu: dict[str, Array]


def takes(name: str, leaf: Shaped) -> bool:
    """Whether Muon updates a leaf: a `kernel` of unrolled rank 2 or more inside `blocks.i`.

    Depthwise convolutions `[kh, kw, 1, C]` are not matrices but one filter per channel, and are left to AdamW.
    """
    shape = unrolled_shape(name, leaf)
    is_kernel = name.rsplit(".", 1)[-1] == "kernel" and len(shape) >= 2
    return is_kernel and _IN_BLOCK.search(name) is not None and not (len(shape) > 2 and shape[-2] == 1)


def _matrices(name: str, leaf: Shaped) -> tuple[tuple[int, ...], int, int]:
    """Shape `[layers, in, parts, out]` in which a leaf is `layers * parts` matrices; then in and out."""
    shape = unrolled_shape(name, leaf)
    parts = FUSED.get(name.split(".")[-2], 1)
    if shape[-1] % parts:
        parts = 1
    fan_in, fan_out = math.prod(shape[:-1]), shape[-1] // parts
    return (leaf.shape[0] if stacked(name) else 1, fan_in, parts, fan_out), fan_in, fan_out


def scale_by_muon(
    params: Mapping[str, Shaped], beta: float, nesterov: bool, mu_dtype: str
) -> optax.GradientTransformation:
    """Momentum, made orthogonal matrix by matrix, times `0.2 * sqrt(max(in, out))`.

    Kernels of more than two axes (convolutions `[kh, kw, in, out]`) are the matrix `[kh * kw * in, out]`. Fused kernels
    (`FUSED`) are cut into their parts. Stacked leaves are a batch of matrices, one program for any depth.

    Args:
        params: the leaves to update, all of which satisfy `takes`.
        beta: momentum.
        nesterov: look ahead by one step of momentum.
        mu_dtype: dtype of the momentum at rest.
    """
    views = {name: _matrices(name, leaf) for name, leaf in params.items()}
    axes = {name: optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=3) for name in params}
    # Without momentum of its own, optax makes what it is given orthogonal.
    inner = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=axes)

    def as_matrices(tree: Mapping[str, Array]) -> dict[str, Array]:
        return {name: leaf.reshape(views[name][0]) for name, leaf in tree.items()}

    def as_leaves(tree: Mapping[str, Array]) -> dict[str, Array]:
        return {name: leaf.reshape(params[name].shape) for name, leaf in tree.items()}

    def init(params: optax.Params) -> State:
        return State(optax.tree.zeros_like(params, dtype=mu_dtype))

    def update(
        updates: optax.Updates, state: State, params: optax.Params | None = None
    ) -> tuple[dict[str, Array], State]:
        mu = {name: beta * state.mu[name] + (1 - beta) * grad for name, grad in updates.items()}
        ahead = {name: beta * mu[name] + (1 - beta) * grad for name, grad in updates.items()} if nesterov else mu
        matrices = as_matrices(ahead)
        directions, _ = inner.update(matrices, inner.init(matrices))
        scaled = {
            name: UPDATE_RMS * math.sqrt(max(views[name][1:])) * direction for name, direction in directions.items()
        }
        return as_leaves(scaled), State(optax.tree.cast(mu, mu_dtype))

    return optax.GradientTransformation(init, update)
