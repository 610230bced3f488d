"""The call of a TPU kernel: which block of each array a step of the grid sees, and the memory it works in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.neighborhood.tiles import BLOCKED
from kernels.neighborhood.tpu_bias import along_x
from kernels.neighborhood.tpu_plan import LANES, Plan

QUERY_MAPS = ("q", "out", "d_out", "d_q")
KEY_MAPS = ("k", "v")
KEY_GRADIENTS = ("d_k", "d_v")
ROWS = ("lse", "d_lse")


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A plan with the memory of a chip.

    The grid is (block of heads, band, example). Examples come last, so that what does not depend on them, and the
    gradient of the bias, which is summed over them, stays on the chip.

    Attributes:
      plan: the layout.
      vmem: bytes of memory on the chip that the kernel may use.
    """

    plan: Plan
    vmem: int

    def steps(self, q: Any) -> int:
        """Steps of the grid that the examples of a packed array take."""
        return q.shape[0] if self.plan.examples == 1 else q.shape[3] // self.plan.examples

    def rows_shape(self, q: Any) -> jax.ShapeDtypeStruct:
        """One float32 for each query and head, by tile: `[step, block, band, tile, head, query]`."""
        plan = self.plan
        shape = (self.steps(q), plan.blocks, plan.bands, plan.band_tiles, plan.block_heads, plan.tiles.queries)
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def key_map(self) -> Any:
        """An unpacked map that holds every box of keys."""
        return self._map([layout.padded_keys for layout in self.plan.layouts])

    def query_map(self) -> Any:
        """An unpacked map that holds every tile of queries."""
        return self._map([layout.padded_queries for layout in self.plan.layouts])

    def _map(self, extent: list[int]) -> Any:
        depth, height, width = extent
        shape = (len(self.plan.parts), depth, height, -(-width // 8) * 8, min(LANES, self.plan.lanes))
        return pltpu.VMEM(shape, jnp.float32)

    def spec(self, name: str, array: Any) -> pl.BlockSpec:
        """The block of an operand or a result, by its name."""
        plan = self.plan
        layouts = plan.layouts
        if plan.examples > 1 and name in QUERY_MAPS + KEY_MAPS + KEY_GRADIENTS:
            shape = (*array.shape[:3], plan.examples, plan.lanes)
            return pl.BlockSpec(shape, lambda block, band, b, *_: (0, 0, 0, b, block))
        if name in QUERY_MAPS:
            shape = (1, *(layout.queries for layout in layouts), plan.lanes)
            return pl.BlockSpec(shape, lambda block, band, b, *_: (b, *self._banded(band), block))
        if name in KEY_MAPS and plan.bands == 1:
            return pl.BlockSpec((1, *array.shape[1:4], plan.lanes), lambda block, band, b, *_: (b, 0, 0, 0, block))
        if name in KEY_MAPS:
            # The keys of a band overlap those of the next, so a block begins at a token, not at a multiple of its size.
            shape = (1, *(layout.keys for layout in layouts), plan.lanes)

            def first(block: Any, band: Any, b: Any, starts: Any, first_keys: Any) -> tuple[Any, ...]:
                tokens = [first_keys[band] * layout.unit if layout.tiles.bands > 1 else 0 for layout in layouts]
                return (b, *tokens, block * plan.lanes)

            return pl.BlockSpec(tuple(pl.Element(size) for size in shape), first)
        if name in KEY_GRADIENTS:
            shape = (1, 1, *(layout.keys for layout in layouts), plan.lanes)
            return pl.BlockSpec(shape, lambda block, band, b, *_: (b, band, 0, 0, 0, block))
        if name in ROWS:
            return pl.BlockSpec((1, 1, 1, *array.shape[3:]), lambda block, band, b, *_: (b, block, band, 0, 0, 0))
        if name in ("extra_keys", "extra_values"):
            return pl.BlockSpec((1, plan.extra_rows, plan.lanes), lambda block, band, b, *_: (b, 0, block))
        if name in ("d_extra_keys", "d_extra_values"):
            return pl.BlockSpec((1, 1, plan.extra_rows, plan.lanes), lambda block, band, b, *_: (b, band, 0, block))
        if name == "bias":
            return pl.BlockSpec((1, *array.shape[1:]), lambda block, *_: (block, 0, 0, 0))
        if name == "d_bias":
            return pl.BlockSpec((1, 1, *array.shape[2:]), lambda block, band, *_: (band, block, 0, 0, 0))
        return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)

    def _banded(self, band: Any) -> tuple[Any, Any, Any]:
        return tuple(band if layout.tiles.bands > 1 else 0 for layout in self.plan.layouts)  # type: ignore

    def operands(self, q: Any, k: Any, v: Any, extra: Any, bias: Any) -> dict[str, Any]:
        """What both directions read, by name."""
        found = {"q": q, "k": k, "v": v, "bias": bias}
        # A mask of zeros (of an axis that the map does not have) would be one more operation to make it.
        found |= {f"masks_{axis}": mask for axis, mask in zip("zyx", self.plan.masks, strict=True) if mask.any()}
        if bias is not None:
            found["along_x"] = along_x(self.plan)
        if extra is not None:
            rows = np.arange(self.plan.extra_rows)[:, None]
            mask = np.where(rows < self.plan.extra, 0.0, BLOCKED).astype(np.float32)
            found |= {"extra_keys": extra[0], "extra_values": extra[1], "extra_mask": mask}
        return found

    def call(
        self,
        kernel: Callable[[Any, dict[str, Any]], None],
        operands: dict[str, Any],
        outputs: dict[str, Any],
        scratch: dict[str, Any],
        *,
        name: str,
    ) -> dict[str, Any]:
        """Runs `kernel(band, references by name)` over the grid. An operand that is None is left out."""
        plan = self.plan
        given = {key: value for key, value in operands.items() if value is not None}
        banded = [layout for layout in plan.layouts if layout.tiles.bands > 1]
        first_keys = banded[0].first_key // banded[0].unit if banded else np.zeros(1, int)
        batch = self.steps(given["q"])

        def body(*refs: Any) -> None:
            names = ["starts", "first_keys", *given, *outputs, *scratch]
            kernel(pl.program_id(1), dict(zip(names, refs, strict=True)))

        results = pl.pallas_call(
            body,
            out_shape=tuple(outputs.values()),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(plan.blocks, plan.bands, batch),
                in_specs=[self.spec(key, value) for key, value in given.items()],
                out_specs=tuple(self.spec(key, value) for key, value in outputs.items()),
                scratch_shapes=tuple(scratch.values()),
            ),
            compiler_params=pltpu.CompilerParams(
                vmem_limit_bytes=self.vmem,
                # The bias is spread for the first example, its gradient folded after the last.
                dimension_semantics=("parallel", "parallel", "arbitrary" if "bias" in given else "parallel"),
            ),
            name=name,
        )(plan.starts, first_keys.astype(np.int32), *given.values())
        return dict(zip(outputs, results, strict=True))
