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
    return jax.shard_map(
        on_one,
        in_specs=tuple(map(spec, layouts)),
        out_specs=tuple(map(spec, results)),
        axis_names=free,
        check_vma=False,
    )(*arguments)
