"""Maps sorted by region, and back: inside the TPU kernels, on references to memory on the chip.

A row of a region is a run of places along x, which begins at any place. A narrow type packs two places into one word,
so rows are cut and joined in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.routed.tpu_plan import LANES, Part, Plan


def sort_by_region(plan: Plan, source: Any, targets: Sequence[Any], *, by_head: bool = False) -> None:
    """Copies a map `[1, Y, X, H * D]` to `[region, place, lanes]` by part.

    With `by_head` a target is `[region, head * place, lanes]`: every place once for each head, with the lanes of the
    other heads zero; regions beyond those of the map become zero.
    """
    (rows, columns), (height, width) = plan.regions, plan.places

    def step(row: Any, _: Any) -> Any:
        for part, target in zip(plan.parts, targets, strict=True):
            lanes = pl.ds(part.first, part.lanes)
            runs = [_wide(source[0, row * height + y, :, lanes].astype(jnp.float32)) for y in range(height)]
            for column in range(columns):
                here = slice(column * width, (column + 1) * width)
                region = jnp.concatenate([run[here] for run in runs], axis=0)
                if by_head:
                    region = jnp.concatenate([_only_head(plan, region, head) for head in range(part.heads)], axis=0)
                target[row * columns + column] = region.astype(target.dtype)
        return 0

    jax.lax.fori_loop(0, rows, step, 0)
    for target in targets:
        for region in range(plan.count, target.shape[0]):
            target[region] = jnp.zeros(target.shape[1:], target.dtype)


def clear(targets: Sequence[Any]) -> None:
    """Sets maps sorted by region to zero."""

    def step(region: Any, _: Any) -> Any:
        for target in targets:
            target[region] = jnp.zeros(target.shape[1:], target.dtype)
        return 0

    jax.lax.fori_loop(0, targets[0].shape[0], step, 0)


def sort_by_place(plan: Plan, sources: Sequence[Any], target: Any) -> None:
    """The reverse of `sort_by_region`, for float32 sources."""
    (rows, columns), (height, width) = plan.regions, plan.places

    def step(row: Any, _: Any) -> Any:
        for part, source in zip(plan.parts, sources, strict=True):
            regions = [source[row * columns + column] for column in range(columns)]
            for y in range(height):
                run = jnp.concatenate([region[y * width : (y + 1) * width] for region in regions], axis=0)
                run = run[:, : part.lanes].astype(target.dtype)
                target[0, row * height + y, :, pl.ds(part.first, part.lanes)] = run
        return 0

    jax.lax.fori_loop(0, rows, step, 0)


def _wide(value: jax.Array) -> jax.Array:
    """All lanes: stores of a narrow type that leave lanes out take twice as long."""
    missing = LANES - value.shape[1]
    return value if not missing else jnp.pad(value, ((0, 0), (0, missing)))


def _only_head(plan: Plan, value: jax.Array, head: int) -> jax.Array:
    """The array with the lanes of all other heads of the part zero."""
    if value.shape[1] == plan.head_dim:
        return value
    return jnp.where(_is_head(plan, value, head), value, jnp.zeros_like(value))


def side_by_side(plan: Plan, part: Part, value: jax.Array) -> jax.Array:
    """`[place, lanes]` from `[head * place, lanes]`, of which each head's rows count in its own lanes only."""
    rows = [value[head * plan.tokens : (head + 1) * plan.tokens] for head in range(part.heads)]
    joined = rows[0]
    for head in range(1, part.heads):
        joined = jnp.where(_is_head(plan, joined, head), rows[head], joined)
    return joined


def _is_head(plan: Plan, value: jax.Array, head: int) -> jax.Array:
    lane = jax.lax.broadcasted_iota(jnp.int32, value.shape, 1)
    return (lane >= head * plan.head_dim) & (lane < (head + 1) * plan.head_dim)
