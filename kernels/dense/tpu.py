"""Dense attention of short sequences on TPUs: the common contract of implementations around the two Pallas kernels."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from kernels.dense import tpu_kernels
from kernels.dense.tpu_kernels import LANES, Plan

LEAST_TOKENS, MOST_TOKENS = 8, 1024
"""Fewer queries or keys fill no rows of a vector: XLA takes sums over them, which are no matter for a matrix unit."""
_DEPTHS = 16
"""Of a head, multiples: rows of a vector of bfloat16, in which a head is cut out of what was turned."""
_BLOCK = 256
"""Queries whose logits are computed at a time, if there are many more."""
_LOGITS = 512 * 1024
"""Of all heads of a group, about: more of them are more code, and fewer fill the pipeline less."""


def refuse(q: Any, k: Any, v: Any, *, with_lse: bool) -> str | None:
    """Why these arguments cannot be had; None: they can."""
    if with_lse:
        return "the logsumexp, which the kernel does not keep"
    if {array.dtype.name for array in (q, k, v)} != {"bfloat16"}:
        return "is for bfloat16: it multiplies float32 in less than full precision"
    if q.shape[-1] != v.shape[-1] or q.shape[2] != k.shape[2]:
        return "takes one head dim, and as many key heads as query heads"
    if q.shape[-1] % _DEPTHS:
        return f"head dim {q.shape[-1]}; the kernel takes multiples of {_DEPTHS}"
    if not all(LEAST_TOKENS <= array.shape[1] <= MOST_TOKENS for array in (q, k)):
        return f"{q.shape[1]} queries and {k.shape[1]} keys; the kernel takes {LEAST_TOKENS} to {MOST_TOKENS}"
    return None


def planned(queries: int, keys: int, heads: int, depth: int, *, packed: bool = False) -> Plan:
    """How the work is cut."""
    block = queries if queries < 2 * _BLOCK else _BLOCK
    possible = [group for group in range(1, heads + 1) if heads % group == 0]
    whole = [group for group in possible if group == heads or group * depth % LANES == 0]
    affordable = [group for group in whole if group * block * keys <= _LOGITS]
    return Plan(heads, depth, max(affordable, default=whole[0]), block, packed)


def forward(
    q: Float[Array, "B N H D"], k: Float[Array, "B M H D"], v: Float[Array, "B M H D"], *, scale: float, with_lse: bool
) -> tuple[Array]:
    """The output."""
    plan = planned(q.shape[1], k.shape[1], *q.shape[2:])
    out = tpu_kernels.forward([_flat(x) for x in (q, k, v)], scale=scale, plan=plan)
    return (out.reshape(q.shape),)


def backward(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M H D"],
    v: Float[Array, "B M H D"],
    d_out: Float[Array, "B N H D"],
    *,
    scale: float,
    with_lse: bool,
) -> tuple[Array, Array, Array]:
    """Gradients of q, k, v; probabilities are computed again."""
    plan = planned(q.shape[1], k.shape[1], *q.shape[2:])
    found = tpu_kernels.backward([_flat(x) for x in (q, k, v)], _flat(d_out), scale=scale, plan=plan)
    d_q, d_k, d_v = (gradient.reshape(like.shape) for gradient, like in zip(found, (q, k, v), strict=True))
    return d_q, d_k, d_v


def _flat(x: Float[Array, "B N H D"]) -> Float[Array, "B N I"]:
    return x.reshape(*x.shape[:2], -1)
