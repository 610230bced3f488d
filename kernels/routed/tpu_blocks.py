"""What both TPU kernels of routed attention have in common: their call, their memory, and the blocks of a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.routed.tpu_plan import LANES, Plan

Refs = dict[str, Any]
"""References by name. A scratch array has one for each part, its number behind its name (`"k0"`, `"k1"`)."""


def call(
    kernel: Callable[[Refs], None],
    operands: dict[str, Any],
    indices: Any,
    outputs: dict[str, Any],
    scratch: dict[str, Any],
    *,
    vmem: int,
    name: str,
) -> dict[str, Any]:
    """Runs `kernel(references)` on every example; its routed regions `[1, choice, region]` are scalars."""
    # Few choices and many regions: this way they take little room, and XLA keeps them so.
    routes = indices.astype(jnp.int32).swapaxes(1, 2)

    def body(*refs: Any) -> None:
        kernel(dict(zip(["routes", *operands, *outputs, *scratch], refs, strict=True)))

    def spec(array: Any, space: Any = pltpu.VMEM) -> pl.BlockSpec:
        return pl.BlockSpec((1, *array.shape[1:]), lambda b: (b, *(0,) * (len(array.shape) - 1)), memory_space=space)

    results = pl.pallas_call(
        body,
        out_shape=tuple(outputs.values()),
        grid=(routes.shape[0],),
        in_specs=[spec(routes, pltpu.SMEM), *(spec(value) for value in operands.values())],
        out_specs=tuple(spec(value) for value in outputs.values()),
        scratch_shapes=tuple(scratch.values()),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=vmem, dimension_semantics=("parallel",)),
        name=name,
    )(routes, *operands.values())
    return dict(zip(outputs, results, strict=True))


def by_region(plan: Plan, name: str, dtype: Any, count: int) -> dict[str, Any]:
    """Scratch `[region, place, 128]` for a map, by part."""
    return {f"{name}{number}": pltpu.VMEM((count, plan.tokens, LANES), dtype) for number in range(len(plan.parts))}


def by_head(plan: Plan, name: str, dtype: Any) -> dict[str, Any]:
    """Scratch `[region, head * place, 128]` for a map of queries, by part."""
    return {
        f"{name}{number}": pltpu.VMEM((plan.padded, plan.columns(part), LANES), dtype)
        for number, part in enumerate(plan.parts)
    }


def parts(plan: Plan, refs: Refs, name: str) -> list[Any]:
    """The references of a scratch array."""
    return [refs[f"{name}{number}"] for number in range(len(plan.parts))]


class Block:
    """Queries of a few regions in one part of the lanes.

    Attributes:
      number, part: which part.
      index: number of the block among all of its part.
      regions: numbers of its regions.
    """

    def __init__(self, plan: Plan, number: int, index: Any, refs: Refs) -> None:
        self.plan, self.number, self.part, self.index = plan, number, plan.parts[number], index
        size = plan.block(self.part)
        self.regions = [index * size + offset for offset in range(size)]
        self._refs = refs
        self._routes: dict[int, list[Any]] = {}

    def of(self, name: str) -> Any:
        """The part's reference of a scratch array."""
        return self._refs[f"{name}{self.number}"]

    def routes(self, region: Any) -> list[Any]:
        """Numbers of the regions that a region is routed to, of those that there are."""
        if id(region) not in self._routes:
            last = self.plan.count - 1
            existing = jnp.minimum(region, last)
            routed = (self._refs["routes"][0, choice, existing] for choice in range(self.plan.topk))
            self._routes[id(region)] = [jnp.clip(number, 0, last) for number in routed]
        return self._routes[id(region)]

    def keys(self, name: str, region: Any) -> jax.Array:
        """`[keys, lanes]` of what a region is routed to."""
        return joined([self.of(name)[routed] for routed in self.routes(region)])

    def queries(self, name: str) -> jax.Array:
        """`[columns, lanes]` of all regions and heads."""
        return joined([self.of(name)[region] for region in self.regions])

    def against_keys(self, name: str, queries: jax.Array) -> jax.Array:
        """`[keys, columns]`: every column multiplied with the keys of its own region.

        All columns are multiplied with the keys of all regions, since lanes of a product that are not used take as
        long, and each keeps its own: nothing of another region gets in, NaN neither.
        """
        rows, columns = self.plan.keys, self.plan.columns(self.part)
        every = product(joined([self.keys(name, region) for region in self.regions]), queries, ((1,), (1,)))
        found = every[:rows]
        column = jax.lax.broadcasted_iota(jnp.int32, found.shape, 1)
        for offset in range(1, len(self.regions)):
            found = jnp.where(column >= offset * columns, every[offset * rows : (offset + 1) * rows], found)
        return found

    def split(self, array: jax.Array, axis: int = 0) -> list[jax.Array]:
        """What each region has of an axis of columns."""
        columns = self.plan.columns(self.part)
        ends = [(offset * columns, (offset + 1) * columns) for offset in range(len(self.regions))]
        return [jax.lax.slice_in_dim(array, first, end, axis=axis) for first, end in ends]


def blocks(plan: Plan, refs: Refs, index: Any) -> Iterator[Block]:
    """The blocks of a pass."""
    for number, part in enumerate(plan.parts):
        count = plan.together // plan.block(part)
        for offset in range(count):
            yield Block(plan, number, index * count + offset, refs)


def joined(arrays: Sequence[jax.Array]) -> jax.Array:
    """One under the other."""
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=0)


def product(left: jax.Array, right: jax.Array, over: Any = ((1,), (0,))) -> jax.Array:
    """Float32. Operands in float32 are multiplied as such: the default would round them to bfloat16."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jax.lax.dot_general(left, right, (over, ((), ())), preferred_element_type=jnp.float32, precision=precision)
