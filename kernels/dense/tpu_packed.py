"""The same kernels on a packed projection, which they read where it lies and whose gradient they write as one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.dense import tpu, tpu_kernels
from kernels.dense.tpu_kernels import LANES, Plan

_ON_CHIP = 12 * 2**20
"""Bytes of an example and what is computed of it; the smallest chips have 16 MiB."""


def refuse(qkv: Any, bias: Any, *, heads: int) -> str | None:
    """Why these arguments cannot be had; None: they can."""
    batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    one = jax.ShapeDtypeStruct((batch, tokens, heads, width // heads), qkv.dtype)
    if reason := tpu.refuse(one, one, one, with_lse=False):
        return reason
    if width % LANES:
        return f"{width} channels of all heads; the kernel takes multiples of {LANES} in one array"
    if (needed := _on_chip(tokens, _planned(qkv, heads))) > _ON_CHIP:
        mebibytes = f"{needed / 2**20:.0f} MiB on the chip; the kernel takes {_ON_CHIP / 2**20:.0f}"
        return f"an example in one array takes {mebibytes}"
    return None


def forward(
    qkv: Float[Array, "B N I"], bias: Float[Array, " I"] | None, *, heads: int, scale: float
) -> tuple[Float[Array, "B N J"]]:
    """The output."""
    return (tpu_kernels.forward(_arrays(qkv, bias), scale=scale, plan=_planned(qkv, heads)),)


def backward(
    qkv: Float[Array, "B N I"],
    bias: Float[Array, " I"] | None,
    d_out: Float[Array, "B N J"],
    *,
    heads: int,
    scale: float,
) -> tuple[Array, ...]:
    """Gradients of the projection and, where there is one, of its bias."""
    found, sums = tpu_kernels.backward(_arrays(qkv, bias), d_out, scale=scale, plan=_planned(qkv, heads))
    return (found,) if bias is None else (found, jnp.sum(sums, axis=(0, 1)).astype(bias.dtype))


def _arrays(qkv: Array, bias: Array | None) -> tuple[Array, Array]:
    return qkv, jnp.zeros((1, qkv.shape[2]), qkv.dtype) if bias is None else bias.astype(qkv.dtype)[None]


def _planned(qkv: Any, heads: int) -> Plan:
    tokens = qkv.shape[1]
    return tpu.planned(tokens, tokens, heads, qkv.shape[2] // 3 // heads, packed=True)


def _on_chip(tokens: int, plan: Plan) -> int:
    """Of the backward pass: three arrays of blocks, twice each, sums in float32 and five maps of logits."""
    width = plan.heads * plan.depth
    blocks = 2 * 2 * tokens * (3 + 1 + 3) * width
    return blocks + 4 * tokens * (2 * plan.lanes + 5 * plan.block)
