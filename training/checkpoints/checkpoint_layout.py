"""How the state of a run is laid out in a checkpoint, and how it is put back.

A checkpoint is a dictionary `{name: array}`. A name is the path through the state joined with `/`, such as
`opt_state/0/mu/blocks.3.attn.qkv.kernel`, and layers are always unrolled, in the optimizer state and the moving
averages too. So a run whose blocks were scanned can go on unrolled and the reverse, and a tool that reads the files
sees one name per layer. A typed random key is stored as its key data.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, PyTree

import models
from training.checkpoints import checksum

SHOWN_NAMES = 5  # how many names an error lists before it only counts


class ArrayInfo(NamedTuple):
    """What a checkpoint says about one array; `checksum` is that of `training.checkpoints.checksum`.

    Checkpoints of format 1 have a `crc32` in its place, and none where several processes wrote.
    """

    shape: tuple[int, ...]
    dtype: str
    checksum: int | None = None
    crc32: int | None = None

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed random key."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def to_host(state: PyTree) -> PyTree:
    """Copies a state to host memory, so that the caller may donate it right away; typed keys become their key data.

    All transfers are started before the first is waited for.
    """
    state = jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, state)
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()
    # np.array, not np.asarray: on the CPU the latter is a view of a buffer that the next step overwrites.
    return jax.tree.map(np.array, state)


def unroll(state: PyTree) -> dict[str, Any]:
    """The arrays of a state by their names in a checkpoint.

    Works on NumPy arrays without copying them, and on JAX arrays inside jit.

    Raises:
      ValueError: two leaves would have the same name.
    """
    arrays: dict[str, Any] = {}
    for name, array in _named(state):
        if name in arrays:
            raise ValueError(f"checkpoint: two arrays of the state have the name {name!r}")
        arrays[name] = array
    return arrays


def _named(state: PyTree) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        yield from _unrolled_leaf(_entries(path), jax.random.key_data(leaf) if is_key(leaf) else leaf)


def expected(template: PyTree) -> dict[str, ArrayInfo]:
    """Names, shapes and types that a checkpoint must have to fill `template` (arrays or `jax.ShapeDtypeStruct`)."""
    arrays = unroll(jax.tree.map(_stand_in, template))
    return {name: ArrayInfo(array.shape, array.dtype.name) for name, array in arrays.items()}


def key_implementations(state: PyTree) -> dict[str, str]:
    """The generator of every typed random key, by name."""
    return {
        "/".join(_entries(path)): str(_key_implementation(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if is_key(leaf)
    }


def fill(template: PyTree, arrays: Mapping[str, np.ndarray], shardings: PyTree[Sharding] | None = None) -> PyTree:
    """Puts the arrays of a checkpoint where `template` has its leaves; the reverse of `unroll`.

    A NumPy leaf of the template gives a NumPy array, any other a `jax.Array`.

    Args:
      template: arrays or `jax.ShapeDtypeStruct`; only shapes, types and shardings are read.
      arrays: host arrays that agree with `expected(template)`.
      shardings: shardings in the structure of the template or a prefix of it (one sharding serves all). None leaves an
        array where the template has it, or on the default device. Of several processes each one sends only the shards
        of its devices.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(template)
    if shardings is None:
        places = [_place_of(leaf) for _, leaf in leaves]
    else:
        places = jax.tree.leaves(jax.tree.broadcast(shardings, template))
    filled = [
        _put(_rolled_leaf(_entries(path), leaf, arrays), leaf, place)
        for (path, leaf), place in zip(leaves, places, strict=True)
    ]
    return jax.tree.unflatten(treedef, filled)


def layer_shardings(template: PyTree, shardings: PyTree[NamedSharding]) -> dict[str, NamedSharding]:
    """Where each array of a checkpoint goes, by name: for the layers of a stacked leaf, the sharding of one layer."""
    found: dict[str, NamedSharding] = {}
    leaves = jax.tree_util.tree_leaves_with_path(template)
    places = jax.tree.leaves(jax.tree.broadcast(shardings, template))
    for (path, leaf), place in zip(leaves, places, strict=True):
        entries = _entries(path)
        stacked = any("[" in entry for entry in entries)
        layer = NamedSharding(place.mesh, PartitionSpec(*place.spec[1:])) if stacked else place
        found |= {name: layer for name, _ in _unrolled_leaf(entries, _stand_in(leaf))}
    return found


def fill_shards(template: PyTree, arrays: Mapping[str, jax.Array], shardings: PyTree[NamedSharding]) -> PyTree:
    """As `fill`, from global arrays that lie as `layer_shardings` says; nothing leaves the devices."""

    def leaf(path: Sequence[Any], leaf: Any, arrays: Mapping[str, jax.Array]) -> jax.Array:
        entries = _entries(path)
        layers = [arrays[name] for name, _ in _unrolled_leaf(entries, _stand_in(leaf))]
        array = jnp.stack(layers) if any("[" in entry for entry in entries) else layers[0]
        return jax.random.wrap_key_data(array, impl=_key_implementation(leaf)) if is_key(leaf) else array

    def assembled(arrays: Mapping[str, jax.Array]) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda path, like: leaf(path, like, arrays), template)

    return jax.jit(assembled, out_shardings=shardings)(dict(arrays))


def difference(saved: Mapping[str, ArrayInfo], wanted: Mapping[str, ArrayInfo]) -> str:
    """What keeps a checkpoint from filling a template, in one line; empty if nothing does."""
    missing = [name for name in wanted if name not in saved]
    unexpected = [name for name in saved if name not in wanted]
    other = [
        f"{name} ({saved[name]} saved, {info} wanted)"
        for name, info in wanted.items()
        if name in saved and saved[name][:2] != info[:2]
    ]
    parts = [(missing, "missing"), (unexpected, "unexpected"), (other, "of another shape or type")]
    return "; ".join(f"{len(names)} {what}: {_some(names)}" for names, what in parts if names)


def checksums(state: PyTree) -> dict[str, int]:
    """Checksums of global arrays by their names in a checkpoint; the devices compute them, and all processes call this.

    Leaves that hold layers are not taken apart for it: a state has far fewer leaves than arrays.
    """
    sums = np.asarray(_checksums(state).addressable_data(0))
    names = [name for name, _ in _named(jax.tree.map(_stand_in, state))]
    return dict(zip(names, sums.tolist(), strict=True))


@jax.jit
def _checksums(state: PyTree) -> Array:
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        stacked = any("[" in entry for entry in _entries(path))
        array = jax.random.key_data(leaf) if is_key(leaf) else leaf
        found.append(jnp.atleast_1d(checksum.of_device(array, layers=stacked)))
    return jnp.concatenate(found)


def matches(array: np.ndarray, info: ArrayInfo) -> bool:
    """Whether an array on the host is what a checkpoint says of it."""
    if (array.shape, array.dtype.name) != info[:2]:
        return False
    if info.checksum is not None:
        return info.checksum == checksum.of_host(array)
    return info.crc32 in (None, zlib.crc32(_bytes_of(array)))


def dtype_of(name: str) -> np.dtype:
    """The NumPy type of a type name, small floats of `ml_dtypes` included."""
    return np.dtype(getattr(ml_dtypes, name, name))


def params_sha256(params: Mapping[str, Array | np.ndarray]) -> str:
    """Hash of parameters by unrolled name, type, shape and bytes; the same for scanned and unrolled blocks.

    Args:
      params: flat dictionary of host or fully addressable device arrays, in any order.
    """
    digest = hashlib.sha256()
    host: dict[str, Any] = {name: np.asarray(array) for name, array in params.items()}
    for name, layer in sorted(models.unstack(host).items()):
        array = np.asarray(layer)
        digest.update(f"{name}:{array.dtype.name}:{array.shape}\n".encode())
        digest.update(_bytes_of(array))
    return digest.hexdigest()


def _bytes_of(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _entries(path: Sequence[Any]) -> list[str]:
    return [jax.tree_util.keystr((entry,), simple=True) for entry in path]


def _unrolled_leaf(entries: list[str], array: Any) -> Iterator[tuple[str, Any]]:
    """The arrays of one leaf: as many as layers if one entry of its path is a stacked name, else itself."""
    for position, entry in enumerate(entries):
        if "[" in entry:
            for name, layer in models.unstack({entry: array}).items():
                yield "/".join([*entries[:position], name, *entries[position + 1 :]]), layer
            return
    yield "/".join(entries), array


def _rolled_leaf(entries: list[str], template: Any, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The reverse of `_unrolled_leaf`; the template's leading axis says how many layers there are."""
    for position, entry in enumerate(entries):
        if "[" in entry:
            layers: dict[str, Any] = {
                name: arrays["/".join([*entries[:position], name, *entries[position + 1 :]])]
                for name in models.unstack({entry: _stand_in(template)})
            }
            return np.asarray(models.stack(layers, like=[entry])[entry])
    return arrays["/".join(entries)]


def _stand_in(leaf: Any) -> Any:
    """An array of the leaf's shape and type that takes no memory."""
    if is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _key_implementation(key: Any) -> Any:
    """As `jax.random.key_impl`, which wants a key with a value, for a `jax.ShapeDtypeStruct` too."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), key)
    return found[0]


def _place_of(leaf: Any) -> Sharding | None:
    """Where the template has a leaf; None where nobody decided it."""
    if isinstance(leaf, jax.Array) and not leaf.committed:
        return None
    return getattr(leaf, "sharding", None)


def _put(array: np.ndarray, template: Any, sharding: Sharding | None) -> Any:
    if is_key(template):
        return jax.random.wrap_key_data(_put(array, None, sharding), impl=_key_implementation(template))
    if isinstance(template, np.ndarray | np.generic):
        return np.array(array)
    if sharding is None:
        return jnp.array(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _some(names: Sequence[str]) -> str:
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
