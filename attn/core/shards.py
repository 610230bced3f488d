"""Attention on the devices of a mesh: every device computes its examples and its heads, on its own.

The batch is split over the mesh axes `data` and `fsdp`, heads over `tensor` (docs/mesh.md). The mesh is the one that a
computation is traced under (`jax.sharding.use_abstract_mesh`, `jax.set_mesh`); without one, or on axes that a
`shard_map` around this one has split already, nothing happens here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

MESH_AXES = {"batch": ("data", "fsdp"), "heads": ("tensor",)}
"""Which axes of a mesh split which kind of axis of an array."""

Layout = tuple[str | None, ...]
"""For each axis of an array what it counts: `"batch"`, `"heads"` (of queries, or of keys), or None for other things."""


def check_mesh(what: str) -> None:
    """Refuses a mesh with explicit axes, on which the shardings of arrays are part of their types.

    Raises:
      ValueError: the mesh that is set has some.
    """
    mesh = jax.sharding.get_abstract_mesh()
    explicit = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit]
    if explicit:
        raise ValueError(
            f"{what} under a mesh with explicit axes ({', '.join(map(str, explicit))}): make the mesh with "
            "axis_types=(jax.sharding.AxisType.Auto,) * its number of axes"
        )


def varying_axes(arrays: Sequence[Any]) -> frozenset[str]:
    """The axes of a `shard_map` around this, over which some of these arrays are not the same on all devices.

    Only one that checks it (`check_vma`) knows: elsewhere there are none.
    """
    types = [jax.typeof(array).manual_axis_type for array in arrays if array is not None]
    return frozenset().union(*(kind.varying for kind in types))


def varying(array: Any, axes: frozenset[str]) -> Any:
    """The array, or None, as one that varies over these axes; its gradient is summed over those that are new."""
    if array is None or not (missing := axes - varying_axes([array])):
        return array
    return jax.lax.pcast(array, tuple(sorted(missing)), to="varying")


def all_varying(arrays: Sequence[Any]) -> tuple[Any, ...]:
    """The arrays as ones that vary over the same axes."""
    axes = varying_axes(arrays)
    return tuple(varying(array, axes) for array in arrays)


def on_shards(
    function: Callable[..., tuple[Any, ...]],
    arguments: Sequence[Any],
    layouts: Sequence[Layout | None],
    results: Sequence[Layout | None],
) -> tuple[Any, ...]:
    """`function(*arguments)`, on each device for its share of examples and heads.

    Examples are split if the devices divide all batch sizes equally, and heads if they divide all numbers of heads;
    what is not split, every device computes whole. Results without a batch axis are summed over shares of the batch.

    Args:
      arguments: arrays, or None.
      layouts: of the arguments; None for None.
      results: layouts of what the function returns; None for None.
    """
    found = _on_shards(function, arguments, layouts, results)
    # Neither kernels nor the shard_map in here say over which axes of one around it their results vary.
    axes = varying_axes(arguments)
    return tuple(varying(array, axes) for array in found)


def _on_shards(
    function: Callable[..., tuple[Any, ...]],
    arguments: Sequence[Any],
    layouts: Sequence[Layout | None],
    results: Sequence[Layout | None],
) -> tuple[Any, ...]:
    mesh = jax.sharding.get_abstract_mesh()
    free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}
    if math.prod(mesh.shape[name] for name in free) == 1:
        return function(*arguments)

    def dividing(kind: str) -> tuple[str, ...]:
        names = tuple(name for name in MESH_AXES[kind] if name in free)
        ways = math.prod(mesh.shape[name] for name in names)
        sizes = [
            size
            for array, layout in zip(arguments, layouts, strict=True)
            if layout is not None
            for size, what in zip(array.shape, layout, strict=True)
            if what == kind
        ]
        return names if all(size % ways == 0 for size in sizes) else ()

    split = {kind: dividing(kind) for kind in MESH_AXES}

    def spec(layout: Layout | None) -> PartitionSpec:
        return PartitionSpec(*(split[kind] or None if kind else None for kind in layout or ()))

    def on_one(*shares: Any) -> tuple[Any, ...]:
        own = function(*shares)
        return tuple(
            jax.lax.psum(value, split["batch"]) if layout and "batch" not in layout and split["batch"] else value
            for value, layout in zip(own, results, strict=True)
        )

    # The kernels inside do not say over which axes their results vary, which is what check_vma asks for.
    run = jax.shard_map(
        on_one,
        in_specs=tuple(map(spec, layouts)),
        out_specs=tuple(map(spec, results)),
        axis_names=free,
        check_vma=False,
    )
    # Called outside of any program, the arrays are where they are; inside of one they are brought to the mesh.
    eager = not any(isinstance(array, jax.core.Tracer) for array in arguments)
    return (jax.jit(run) if eager else run)(*arguments)
