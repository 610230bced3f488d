"""Devices as a mesh with the axes `data`, `fsdp` and `tensor`, and where each array of a run lives on it.

Batches are split over `data` and `fsdp`. A parameter is split over `tensor` by the rule of its layer kind and over
`fsdp` along its largest axis that divides; optimizer and moving average follow their parameter. XLA inserts the
collectives.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# (pattern of the name, axis counted from the end that is split over `tensor`): outputs of the first matrix of a pair,
# inputs of
# the second, so that a pair needs one sum over devices.
TENSOR_RULES: tuple[tuple[str, int], ...] = (
    (r"\.(qkv|q|k|v|kv|fc1)\.kernel$", -1),
    (r"\.(qkv|q|k|v|kv|fc1)\.bias$", -1),
    (r"\.(proj|fc2)\.kernel$", -2),
    (r"(^|\.)head\.kernel$", -1),
)


def create(mesh: Any, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays out devices by `config.mesh`.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
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
    return Mesh(np.asarray(devices).reshape(data, fsdp, tensor), ("data", "fsdp", "tensor"))


def batch_ways(mesh: Mesh) -> int:
    """Into how many shards a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(name: str, size: int, mesh: Mesh, parts: int = 1) -> None:
    """Refuses a batch size that the devices cannot share equally."""
    ways = batch_ways(mesh)
    if size % (ways * parts):
        what = f"{ways} devices (mesh.data x mesh.fsdp)" + (f" x {parts} accumulated parts" if parts > 1 else "")
        lower = size // (ways * parts) * ways * parts
        raise ValueError(
            f"{name}={size}: must be a multiple of {ways * parts}, {what}; nearest: {lower or ways * parts}, "
            f"{lower + ways * parts}"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_spec(name: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """How a parameter is split; a leading axis of scanned layers never is."""
    axes: list[str | None] = [None] * len(shape)
    first = 1 if ".[" in name else 0
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    for pattern, axis in TENSOR_RULES:
        if tensor > 1 and re.search(pattern, name):
            if shape[axis] % tensor:
                raise ValueError(f"config.mesh.tensor={tensor}: does not divide axis {axis} of {name} {tuple(shape)}")
            axes[axis] = "tensor"
            break
    if fsdp > 1:
        free = [
            i for i in range(first, len(shape)) if axes[i] is None and shape[i] % fsdp == 0 and shape[i] >= 2 * fsdp
        ]
        if free:
            axes[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*axes)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """Shardings for any pytree whose parameter-shaped parts are flat dictionaries keyed by parameter names."""

    def leaf(path: tuple, value: Any) -> NamedSharding:
        names = [
            k.key for k in path if isinstance(k, jax.tree_util.DictKey) and isinstance(k.key, str) and "." in k.key
        ]
        spec = parameter_spec(names[-1], value.shape, mesh) if names and value.ndim else PartitionSpec()
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Sends this process's part of a global batch to its devices, without waiting."""
    return {name: jax.make_array_from_process_local_data(sharding, narrow(value)) for name, value in batch.items()}


def narrow(value: np.ndarray) -> np.ndarray:
    """64-bit numbers as the 32-bit ones that devices use."""
    if value.dtype == np.int64:
        return value.astype(np.int32)
    return value.astype(np.float32) if value.dtype == np.float64 else value
