"""Unrolled names of stacked leaves, and patterns over them.

A stacked leaf `blocks.[0::1].attn.qkv.kernel` of shape [L, ...] holds the L parameters `blocks.0.attn.qkv.kernel` ...
Whatever is decided by name is decided for each of those, and kept as one NumPy value per leaf: of shape [] for a plain
leaf and [L] for a stacked one. The decision is made before tracing, so that the compiled program has one operation per
leaf whatever its depth.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import naming
from models.core.state import unrolled_names

_SLICE = re.compile(r"\[(\d+)::(\d+)\]")

Shaped = Any  # anything with a `.shape`: jax.Array, np.ndarray, jax.ShapeDtypeStruct


def nearest(what: str, name: str, allowed: Collection[str]) -> str:
    """One line for an unknown name: what it is, what is allowed, and the nearest of these."""
    close = naming.close(name, allowed, most=1, cutoff=0.0)
    return f"{what}: unknown name {name!r}; allowed: {', '.join(allowed)}; nearest: {close[0] if close else 'none'}"


def stacked(name: str) -> bool:
    """Whether a leaf of this name has a leading axis of layers."""
    return _SLICE.search(name) is not None


def unrolled(name: str, leaf: Shaped) -> list[str]:
    """Names of the parameters in a leaf, in the order of its leading axis (`[name]` when it is not stacked)."""
    return unrolled_names(name, leaf.shape[0] if stacked(name) else 1)


def sliced_name(name: str, start: int, step: int) -> str:
    """Name of every `step`-th layer of a leaf, from `start`: `blocks.[1::2].w` with 3 and 2 is `blocks.[7::4].w`."""

    def sliced(found: re.Match[str]) -> str:
        return f"[{int(found[1]) + int(found[2]) * start}::{int(found[2]) * step}]"

    return _SLICE.sub(sliced, name)


def unrolled_shape(name: str, leaf: Shaped) -> tuple[int, ...]:
    """Shape of one of the parameters in a leaf."""
    return tuple(leaf.shape[1:] if stacked(name) else leaf.shape)


def per_layer(name: str, leaf: Shaped, value: Callable[[str], Any]) -> np.ndarray:
    """`value` of each unrolled name: shape [] for a plain leaf, [L] for a stacked one."""
    values = np.asarray([value(one) for one in unrolled(name, leaf)])
    return values if stacked(name) else values[0]


def expand(values: np.ndarray | Array, ndim: int) -> Array:
    """Give a [] or [L] value trailing axes of length one, so that it broadcasts against a leaf with `ndim` axes."""
    return jnp.reshape(values, np.shape(values) + (1,) * (ndim - np.ndim(values)) if np.ndim(values) else ())


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names a parameter, or a module that holds it.

    The regular expression has to cover the whole unrolled name or its beginning up to a dot: `blocks.1` matches
    `blocks.1.norm1.bias` and not `blocks.10.norm1.bias`; `.*\\.bias` matches every bias; `bias` matches nothing but a
    parameter or module of that very name.
    """
    return re.fullmatch(rf"(?:{pattern})(?:\..*)?", name) is not None


def select(what: str, patterns: Iterable[str], params: Mapping[str, Shaped]) -> dict[str, np.ndarray]:
    """Which parameters are matched by any of the patterns: {leaf name: bool [] or [L]}.

    Raises:
        ValueError: `what` (a config key) holds a pattern that is not a regular expression or that matches nothing.
    """
    names = [one for name, leaf in params.items() for one in unrolled(name, leaf)]
    patterns = tuple(patterns)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{what}: {pattern!r} is not a regular expression: {error}") from None
        if not any(matches(pattern, name) for name in names):
            modules = {name.rsplit(".", depth)[0] for name in names for depth in range(name.count(".") + 1)}
            close = naming.close(pattern.replace("\\", ""), sorted(modules), cutoff=0.0)
            raise ValueError(
                f"{what}: {pattern!r} matches no parameter (it has to name a whole parameter or module); "
                f"nearest: {', '.join(close)}"
            )
    return {
        name: per_layer(name, leaf, lambda one: any(matches(pattern, one) for pattern in patterns))
        for name, leaf in params.items()
    }
