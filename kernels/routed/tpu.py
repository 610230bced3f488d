"""Routed attention on TPUs: the common contract of implementations around the two Pallas kernels.

Arrays come heads last, `[B, Y, X, H, D]`, which is the packed output of a projection seen with one more axis; the
kernels read it packed, so that neither side is copied.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from kernels.neighborhood.tpu_choice import chip_memory
from kernels.routed import tpu_backward, tpu_forward
from kernels.routed.tpu_plan import LANES, Plan

_DTYPES = ("float32", "bfloat16")
_ROWS = 16
"""Places that a region has a multiple of: rows of a vector of a narrow type."""


def refuse(q: Any, k: Any, v: Any, indices: Any, *, regions: tuple[int, int]) -> str | None:
    """Why these arguments cannot be had here; None if they can."""
    if str(q.dtype) not in _DTYPES:
        return f"dtype {q.dtype}; the kernel takes {' and '.join(_DTYPES)}"
    if not tuple(q.shape) == tuple(k.shape) == tuple(v.shape):
        return f"keys {tuple(k.shape)}, values {tuple(v.shape)}; the kernel takes those of the shape of the queries"
    if q.shape[-1] < 8 or LANES % q.shape[-1]:
        return f"head dim {q.shape[-1]}; the kernel takes 8, 16, 32, 64 and 128"
    plan = make_plan(q, indices, regions)
    if plan.tokens % _ROWS:
        return f"regions of {plan.tokens} places; the kernel takes multiples of {_ROWS}"
    needed = plan.memory(jnp.dtype(q.dtype).itemsize, q.shape[0])
    if needed > chip_memory():
        return f"an example needs {needed / 2**20:.0f} MiB on the chip, which has {chip_memory() / 2**20:.0f}"
    return None


def make_plan(q: Any, indices: Any, regions: tuple[int, int]) -> Plan:
    """The plan for queries `[B, Y, X, H, D]`."""
    places = (q.shape[1] // regions[0], q.shape[2] // regions[1])
    return Plan(regions, places, q.shape[3], q.shape[4], indices.shape[-1])


def forward(q: Any, k: Any, v: Any, indices: Any, *, regions: tuple[int, int], scale: float) -> tuple[Any, Any]:
    """Output `[B, Y, X, H, D]` and logsumexp `[B, Y, X, H]` float32."""
    plan = make_plan(q, indices, regions)
    q_map, k_map, v_map = (_packed(array) for array in (q, k, v))
    out, lse = tpu_forward.forward(plan, q_map, k_map, v_map, indices, scale=scale, vmem=chip_memory())
    return out.reshape(q.shape), _lse_map(plan, lse)


def backward(
    q: Any,
    k: Any,
    v: Any,
    indices: Any,
    out: Any,
    lse: Any,
    d_out: Any,
    *,
    regions: tuple[int, int],
    scale: float,
) -> tuple[Any, Any, Any]:
    """Gradients of q, k and v. Neither `out` nor `lse` is read: all keys of a query are on the chip at once."""
    plan = make_plan(q, indices, regions)
    maps = tuple(_packed(array) for array in (q, k, v, d_out))
    d_q, d_k, d_v = tpu_backward.backward(plan, *maps, indices=indices, scale=scale, vmem=chip_memory())
    return d_q.reshape(q.shape), d_k.reshape(q.shape), d_v.reshape(q.shape)


def _packed(array: Any) -> Any:
    return array.reshape(*array.shape[:3], math.prod(array.shape[3:]))


def _lse_map(plan: Plan, parts: list[Any]) -> Any:
    """`[B, Y, X, H]` from rows by block."""
    (rows, columns), (height, width) = plan.regions, plan.places
    maps = []
    for part, values in zip(plan.parts, parts, strict=True):
        regions = values.reshape(values.shape[0], plan.padded, part.heads, plan.tokens)[:, : plan.count]
        split = regions.reshape(-1, rows, columns, part.heads, height, width).transpose(0, 1, 4, 2, 5, 3)
        maps.append(split.reshape(-1, rows * height, columns * width, part.heads))
    return maps[0] if len(maps) == 1 else jnp.concatenate(maps, axis=-1)
