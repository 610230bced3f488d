"""Norms of gradients by layer, and where they, or parameters, stopped being finite."""

import re
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from training.optim.patterns import Shaped, stacked, unrolled

# `blocks.3`, `stages.1.blocks.0`, `stages.1`, `head`: up to the number of a block, else of a list entry, else one word.
_GROUP = re.compile(r"(.*?\bblocks\.\d+|[^.]+\.\d+|[^.]+)(?:\.|$)")


def squared_norms(grads: Mapping[str, Array]) -> dict[str, Float[Array, "*layers"]]:
    """Sum of squares of every leaf in float32: [] for a plain leaf, [L] for a stacked one."""
    return {
        name: jnp.sum(jnp.square(grad.astype(jnp.float32)), axis=tuple(range(int(stacked(name)), grad.ndim)))
        for name, grad in grads.items()
    }


def global_norm(squared: Iterable[Float[Array, "*layers"]]) -> Float[Array, ""]:
    """Norm of everything, from values of `squared_norms`."""
    return jnp.sqrt(sum((jnp.sum(value) for value in squared), jnp.zeros([], jnp.float32)))


def _group(name: str) -> str:
    found = _GROUP.match(name)
    return found[1] if found else name


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def param_groups(params: Mapping[str, Shaped]) -> list[str]:
    """Names of the groups in reports (`blocks.0`, `blocks.1`, ..., `head`, `patch_embed`), the same for stacked leaves.

    Args:
        params: leaves with a shape (parameters, gradients, or values of `squared_norms`).
    """
    return sorted({_group(one) for name, leaf in params.items() for one in unrolled(name, leaf)}, key=_natural)


def nonfinite_groups(squared: Mapping[str, Float[Array, "*layers"]], groups: Sequence[str]) -> Bool[Array, "groups"]:
    """Which groups have a gradient that is infinite, not a number, or too large to be squared in float32.

    Args:
        squared: from `squared_norms`.
        groups: from `param_groups`, of the same names or more; a group with no gradient is never bad.
    """
    return _any_in_group({name: ~jnp.isfinite(value) for name, value in squared.items()}, groups)


def overflowed_groups(params: Mapping[str, Array], groups: Sequence[str]) -> Bool[Array, "groups"]:
    """Which groups have a parameter that is infinite or not a number; `groups` from `param_groups`."""
    return _any_in_group({name: _any_nonfinite(value, int(stacked(name))) for name, value in params.items()}, groups)


def all_finite(tree: PyTree[Array]) -> Bool[Array, ""]:
    """Whether every floating number of a tree is finite; integers and random keys always are."""
    floating = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return ~jnp.any(jnp.asarray([_any_nonfinite(leaf, 0) for leaf in floating] or [False]))


def _any_nonfinite(value: Array, first_axis: int) -> Bool[Array, "*layers"]:
    return jnp.any(~jnp.isfinite(value), axis=tuple(range(first_axis, value.ndim)))


def _any_in_group(bad: Mapping[str, Bool[Array, "*layers"]], groups: Sequence[str]) -> Bool[Array, "groups"]:
    number = {group: i for i, group in enumerate(groups)}
    owner = np.asarray([number[_group(one)] for name, value in bad.items() for one in unrolled(name, value)])
    flags = jnp.concatenate([jnp.ravel(value) for value in bad.values()])
    return jax.ops.segment_sum(flags.astype(jnp.int32), owner, num_segments=len(groups)) > 0
