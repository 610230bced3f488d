"""Devices as a mesh with the axes `data`, `fsdp` and `tensor`, and where each array of a run lives on it.

Batches are split over `data` and `fsdp`, parameters by the rules of `models/core/sharding.py`; optimizer state and
moving averages follow their parameter, everything else is whole on every device. XLA inserts the collectives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.core import sharding

AXES = ("data", "fsdp", "tensor")


def create(mesh: Any, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays out devices by `config.mesh`.

    Neighbours on an axis are neighbours in the chip network where the platform has one. Slices of TPUs, which only the
    slower data-center network connects, are told apart by the outermost part of `data`, so that only sums of gradients
    cross it.

    Raises:
      ValueError: the axes do not multiply to the number of devices, or `data` is no multiple of the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    data, fsdp, tensor = mesh.data, mesh.fsdp, mesh.tensor
    rest = fsdp * tensor
    if data == -1 and len(devices) % rest:
        raise ValueError(
            f"config.mesh: fsdp={fsdp} x tensor={tensor} does not divide the {len(devices)} devices of this run"
        )
    data = len(devices) // rest if data == -1 else data
    if data * rest != len(devices):
        raise ValueError(
            f"config.mesh: data={data} x fsdp={fsdp} x tensor={tensor} is {data * rest}, but there are "
            f"{len(devices)} devices"
        )
    slices = slice_count(devices)
    if data % slices:
        raise ValueError(
            f"config.mesh.data={data}: must be a multiple of the {slices} slices; lower config.mesh.fsdp={fsdp} or "
            f"config.mesh.tensor={tensor}, which have to fit into one slice"
        )
    shape = (data // slices, fsdp, tensor)
    if devices[0].platform != "tpu":
        grid = np.asarray(devices).reshape(data, fsdp, tensor)
    elif slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(shape, (slices, 1, 1), devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES)


def slice_count(devices: Sequence[jax.Device]) -> int:
    """How many TPU slices the devices belong to; 1 for everything else."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def under(mesh: Mesh, function: Callable) -> Callable:
    """`function`, traced under the mesh, so that layers can constrain their arrays to it."""

    @functools.wraps(function)
    def traced(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return traced


def check_batch(name: str, size: int, mesh: Mesh, parts: int = 1) -> None:
    """Refuses a batch size that the devices cannot share equally."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if size % (ways * parts):
        what = f"{ways} devices (mesh.data x mesh.fsdp)" + (f" x {parts} accumulated parts" if parts > 1 else "")
        lower = size // (ways * parts) * ways * parts
        raise ValueError(
            f"{name}={size}: must be a multiple of {ways * parts}, {what}; nearest: {lower or ways * parts}, "
            f"{lower + ways * parts}"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(sharding.BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_spec(name: str, shape: Sequence[int], rules: Mapping[str, sharding.Split], mesh: Mesh) -> PartitionSpec:
    """How the array of a parameter's name is stored; a leading axis of scanned layers is never split.

    Raises:
      ValueError: the devices do not divide what the parameter consists of.
    """
    stacked = ".[" in name
    spec = sharding.parameter_spec(shape[stacked:], rules.get(name), mesh.shape)
    return PartitionSpec(None, *spec) if stacked else spec


def tree_shardings(tree: Any, rules: Mapping[str, sharding.Split], mesh: Mesh) -> Any:
    """Shardings for any pytree whose parameter-shaped parts are flat dictionaries keyed by parameter names.

    Args:
      tree: arrays or their shapes.
      rules: of the model, from `models.core.sharding.rules`.
    """

    def leaf(path: tuple, value: Any) -> NamedSharding:
        names = [
            k.key for k in path if isinstance(k, jax.tree_util.DictKey) and isinstance(k.key, str) and "." in k.key
        ]
        spec = parameter_spec(names[-1], value.shape, rules, mesh) if names and value.ndim else PartitionSpec()
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(leaf, tree)


# --- arrays of several processes --------------------------------------------------------------------------------------


def place(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has whole, as global arrays.

    Args:
      tree: NumPy arrays, or JAX arrays of this process.
      shardings: in the structure of the tree, or a prefix of it (one sharding serves all).
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(value: Any, sharding: NamedSharding) -> jax.Array:
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(value), sharding), impl=jax.random.key_impl(value))
        host = np.asarray(value)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, jax.tree.broadcast(shardings, tree))


def gather(tree: Any) -> Any:
    """Global arrays as NumPy arrays, whole on every process; all processes call it."""

    def whole(value: jax.Array) -> np.ndarray:
        if not value.is_fully_addressable and not value.is_fully_replicated:
            # One at a time: all of them whole at once may not fit.
            assert isinstance(value.sharding, NamedSharding)
            value = jax.jit(lambda x: x, out_shardings=NamedSharding(value.sharding.mesh, PartitionSpec()))(value)
        return np.asarray(value)

    return jax.tree.map(whole, tree)


def batch_rows(sharding: NamedSharding, batch_size: int) -> list[int]:
    """Rows of a global batch that this process's devices hold, ascending.

    A process need not hold neighbouring rows (devices are laid out for the chip network), and two processes hold the
    same ones where `tensor` reaches from one to the other.
    """
    ways = _ways(sharding)
    size = batch_size // ways
    return [row for shard in _shards_here(sharding, ways) for row in range(shard * size, (shard + 1) * size)]


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Sends this process's rows of a global batch to its devices, without waiting."""
    if jax.process_count() == 1:
        return {name: jax.device_put(narrow(value), sharding) for name, value in batch.items()}
    ways = _ways(sharding)
    here = _shards_here(sharding, ways)

    def put(value: np.ndarray) -> jax.Array:
        size = value.shape[0] // len(here)

        def shard(index: Any) -> np.ndarray:
            first = here.index((index[0].start or 0) // size) * size
            return value[first : first + size]

        return jax.make_array_from_callback((size * ways, *value.shape[1:]), sharding, shard)

    return {name: put(narrow(value)) for name, value in batch.items()}


def _ways(sharding: NamedSharding) -> int:
    return sharding.mesh.shape["data"] * sharding.mesh.shape["fsdp"]


def _shards_here(sharding: NamedSharding, ways: int) -> list[int]:
    indices = sharding.addressable_devices_indices_map((ways,)).values()
    return sorted({index[0].start or 0 for index in indices if index is not None})


def narrow(value: np.ndarray) -> np.ndarray:
    """64-bit numbers as the 32-bit ones that devices use."""
    if value.dtype == np.int64:
        return value.astype(np.int32)
    return value.astype(np.float32) if value.dtype == np.float64 else value
