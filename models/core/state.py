"""Models to flat dictionaries and back, and the names of scanned blocks.

A flat dictionary `{dotted name: array}` is the only form in which parameters leave a model. A scanned stack holds one
leaf for many layers; its name says which, as a slice: `blocks.[0::1].attn.qkv.kernel` has layer `0 + 1*i` at index i.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import naming

Flat = dict[str, Any]  # of JAX or NumPy arrays, or of their shapes
Path = tuple[Any, ...]

_SLICE = re.compile(r"\[(\d+)::(\d+)\]")
_NUMBER = re.compile(r"(?<![^.])(?:0|[1-9]\d*)(?![^.])")  # an entry of a dotted name


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


def unrolled(flat: Mapping[str, Any]) -> Flat:
    """Like `unstack`, but without the numbers of scanned leaves: shapes by layer for these; other entries pass
    through."""
    result: Flat = {}
    for name, value in flat.items():
        names = unrolled_names(name, *value.shape[:1] or (0,))
        layer = value if names == [name] else jax.ShapeDtypeStruct(value.shape[1:], value.dtype)
        result |= dict.fromkeys(names, layer)
    return result


def stack(flat: Mapping[str, Any], like: Iterable[str]) -> Flat:
    """Inverse of `unstack`: entries named as in `like`, layers stacked where a name there is a slice.

    All leaves of a scanned stack (`blocks.[0::1].a`, `blocks.[0::1].b`) have the layers of one depth: as many as the
    arrays of `like`, where it is a mapping to arrays, else up to the last one in `flat`.

    KeyError if an entry is missing, a layer of one leaf among them, or is named by nothing in `like`.
    """
    names = list(like)
    depths = _depths(flat, names, like if isinstance(like, Mapping) else {})
    result: Flat = {}
    used: set[str] = set()
    for name in names:
        if _SLICE.search(name) is None:
            members = [name]
            if name not in flat:
                raise KeyError(f"stack: no entry {name}{_nearest(name, flat)}")
            result[name] = flat[name]
        else:
            members = _layers(name, depths, flat)
            result[name] = _stack_arrays([flat[member] for member in members])
        used.update(members)
    left = [name for name in flat if name not in used]
    if left:
        raise KeyError(f"stack: {len(left)} entries fit no name in `like`, first {left[0]}")
    return result


def _sliced(name: str) -> tuple[str, int, int, str]:
    """(stack, first layer, step, name within a layer) of a scanned leaf: ("blocks.", 1, 2, ".w")."""
    match = _SLICE.search(name)
    assert match is not None
    return name[: match.start()], int(match[1]), int(match[2]), name[match.end() :]


def _depths(flat: Mapping[str, Any], names: Iterable[str], arrays: Mapping[str, Any]) -> dict[str, int]:
    """Layers of each scanned stack."""
    present: dict[tuple[str, str], set[int]] = {}
    for name in flat:
        for match in _NUMBER.finditer(name):
            present.setdefault((name[: match.start()], name[match.end() :]), set()).add(int(match[0]))
    depths: dict[str, int] = {}
    for name in filter(_SLICE.search, names):
        prefix, start, step, suffix = _sliced(name)
        if shape := getattr(arrays.get(name), "shape", ()):
            last = start + step * (shape[0] - 1)
        else:
            own = present.get((prefix, suffix), set())
            last = max((layer for layer in own if layer >= start and (layer - start) % step == 0), default=start)
        depths[prefix] = max(depths.get(prefix, 0), last + 1)
    return depths


def _layers(name: str, depths: Mapping[str, int], flat: Mapping[str, Any]) -> list[str]:
    """Entries of a scanned leaf, in order. KeyError for one that is not there."""
    prefix, start, step, _ = _sliced(name)
    members = unrolled_names(name, len(range(start, depths[prefix], step)))
    missing = [number for number, member in enumerate(members) if member not in flat]
    if len(missing) == len(members):
        raise KeyError(f"stack: no entry {members[0]}, the first layer of {name}")
    if missing:
        behind = [member for member in members[missing[0] + 1 :] if member in flat]
        other = f"layers of {name} behind it, first {behind[0]}" if behind else f"{depths[prefix]} layers of {prefix}*"
        raise KeyError(f"stack: no entry {members[missing[0]]}, but {other}")
    return members


def _stack_arrays(values: list[Any]) -> Any:
    return np.stack(values) if all(isinstance(value, np.ndarray) for value in values) else jnp.stack(values)


def _name(path: Path) -> str:
    return ".".join(map(str, path))


def _named(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    return {_name(path): value for path, value in leaves.items()}


def _nearest(name: str, names: Iterable[str]) -> str:
    close = naming.close(name, names, most=1)
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
