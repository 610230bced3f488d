"""Models to flat dictionaries and back, and the names of scanned blocks.

A flat dictionary `{dotted name: array}` is the only form in which parameters leave a model. A scanned stack holds one
leaf for many layers; its name says which, as a slice: `blocks.[0::1].attn.qkv.kernel` has layer `0 + 1*i` at index i.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

Flat = dict[str, Any]  # of JAX or NumPy arrays, or of their shapes
Path = tuple[Any, ...]

_SLICE = re.compile(r"\[(\d+)::(\d+)\]")


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """The static half of a split model: hashable, so it can be a static argument of `jax.jit` or be closed over."""

    definition: nnx.GraphDef
    params: tuple[Path, ...]
    state: tuple[Path, ...]

    def __post_init__(self):
        # Hashing walks every module of the model; a jitted call would pay for it on each step.
        object.__setattr__(self, "_hash", hash((self.definition, self.params, self.state)))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Graph) and hash(self) == hash(other) and self.definition == other.definition


def split(model: nnx.Module) -> tuple[Graph, Flat, Flat]:
    """`(graph, params, state)`: static structure, `{name: array}` of parameters, `{name: array}` of everything else.

    Leaves may be arrays, tracers or `jax.ShapeDtypeStruct`. After a call with `train=True` the state is the new one.
    """
    definition, leaves = nnx.split(model)
    params: dict[Path, Any] = {}
    state: dict[Path, Any] = {}
    for path, variable in nnx.to_flat_state(leaves):
        (params if isinstance(variable, nnx.Param) else state)[path] = variable.get_value()
    return Graph(definition, tuple(params), tuple(state)), _named(params), _named(state)


def merge(graph: Graph, params: Mapping[str, Any], state: Mapping[str, Any]) -> nnx.Module:
    """The model again, inside or outside `jax.jit`. KeyError for a name that is missing or too many."""
    leaves: Any = {}
    for paths, flat, kind in ((graph.params, params, "parameter"), (graph.state, state, "state entry")):
        names = {_name(path): path for path in paths}
        if names.keys() != flat.keys():
            raise KeyError(_difference(kind, names, flat))
        leaves |= {path: flat[name] for name, path in names.items()}
    return nnx.merge(graph.definition, nnx.from_flat_state(leaves))


def unrolled_names(name: str, layers: int) -> list[str]:
    """Names of the layers held by a scanned leaf: `unrolled_names("blocks.[1::2].w", 2)` is blocks.1.w, blocks.3.w.

    A name without a slice is its own list, whatever `layers` is.
    """
    match = _SLICE.search(name)
    if match is None:
        return [name]
    start, step = int(match[1]), int(match[2])
    return [f"{name[: match.start()]}{start + step * i}{name[match.end() :]}" for i in range(layers)]


def unstack(flat: Mapping[str, Any]) -> Flat:
    """One entry per layer in place of each scanned leaf. Works on JAX and NumPy arrays; other entries pass through."""
    result: Flat = {}
    for name, value in flat.items():
        if _SLICE.search(name):
            result |= zip(unrolled_names(name, value.shape[0]), value, strict=True)
        else:
            result[name] = value
    return result


def stack(flat: Mapping[str, Any], like: Iterable[str]) -> Flat:
    """Inverse of `unstack`: entries named as in `like`, layers stacked where a name there is a slice.

    KeyError if an entry is missing, or is named by nothing in `like`.
    """
    result: Flat = {}
    used: set[str] = set()
    for name in like:
        if _SLICE.search(name) is None:
            members = [name]
            if name not in flat:
                raise KeyError(f"stack: no entry {name}{_nearest(name, flat)}")
            result[name] = flat[name]
        else:
            members = _present_layers(name, flat)
            values = [flat[member] for member in members]
            result[name] = _stack_arrays(values)
        used.update(members)
    left = [name for name in flat if name not in used]
    if left:
        raise KeyError(f"stack: {len(left)} entries fit no name in `like`, first {left[0]}")
    return result


def _present_layers(name: str, flat: Mapping[str, Any]) -> list[str]:
    members: list[str] = []
    while (following := unrolled_names(name, len(members) + 1)[-1]) in flat:
        members.append(following)
    if not members:
        raise KeyError(f"stack: no entry {unrolled_names(name, 1)[0]}, the first layer of {name}")
    return members


def _stack_arrays(values: list[Any]) -> Any:
    return np.stack(values) if all(isinstance(value, np.ndarray) for value in values) else jnp.stack(values)


def _name(path: Path) -> str:
    return ".".join(map(str, path))


def _named(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    return {_name(path): value for path, value in leaves.items()}


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; nearest: {close[0]}" if close else ""


def _difference(kind: str, expected: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    missing = [name for name in expected if name not in given]
    extra = [name for name in given if name not in expected]
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing, first {missing[0]}{_nearest(missing[0], given)}")
    if extra:
        parts.append(f"{len(extra)} unknown, first {extra[0]}{_nearest(extra[0], expected)}")
    return f"merge: {kind} names differ from the model's: {'; '.join(parts)}"
