"""Neighborhood attention on small maps as dense attention under a mask, by the compiler.

Every pair of tokens is multiplied, and those that do not see each other masked. On a TPU this is faster than a kernel
that goes from example to example, as it does where it cannot take several side by side, while the logits of all pairs
stay on the chip. Arguments and results of the three functions: docs/neighborhood.md.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attn.core.numerics import product
from kernels.neighborhood.pattern import Axis, Pattern
from kernels.neighborhood.tpu_choice import side_by_side

Gradients = tuple[Array, Array, Array, Array | None, Array | None, Array | None]

LARGEST = 40 * 2**20
"""Bytes of logits that stay on every chip, with their probabilities beside them (docs/kernels.md, small maps)."""


def unprofitable(
    q: Any, k: Any, v: Any, bias: Any = None, extra_keys: Any = None, extra_values: Any = None, *, pattern: Pattern
) -> str | None:
    """Why these arguments are faster in tiles; None if they are not."""
    if q.shape[0] == 1:
        return "a kernel is faster for one example"
    extra = 0 if extra_keys is None else extra_keys.shape[1]
    if side_by_side(pattern, q.shape[0], extra) > 1:
        return "a kernel that takes several examples side by side is faster"
    needed = 4 * q.shape[0] * q.shape[-2] * pattern.tokens * (pattern.tokens + extra)
    if needed > LARGEST:
        return f"logits of all pairs take {needed / 2**20:.0f} MiB; above {LARGEST / 2**20:.0f} a kernel is faster"
    return None


def forward(
    q: Float[Array, "B *S H D"],
    k: Float[Array, "B *S K D"],
    v: Float[Array, "B *S K E"],
    bias: Float[Array, "H ..."] | None,
    extra_keys: Float[Array, "B M K D"] | None,
    extra_values: Float[Array, "B M K E"] | None,
    *,
    pattern: Pattern,
    scale: float,
) -> tuple[Float[Array, "B *S H E"], Float[Array, "B *S H"]]:
    """Output in the dtype of `v`, and the logsumexp of every query in float32."""
    batch, heads = q.shape[0], q.shape[-2]
    keys, values = _all(k, extra_keys, heads), _all(v, extra_values, heads)
    queries = q.reshape(batch, pattern.tokens, heads, -1)
    logits = scale * product("bnhd,bmhd->bhnm", queries, keys)
    extra = keys.shape[1] - pattern.tokens
    if bias is not None:
        logits += jnp.pad(spread_bias(pattern, bias), ((0, 0), (0, 0), (0, extra)))
    if not pattern.is_dense:
        seen = np.pad(pattern.mask(), ((0, 0), (0, extra)), constant_values=True)
        logits = jnp.where(seen, logits, -jnp.inf)
    largest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp(logits - largest)
    total = weights.sum(axis=-1, keepdims=True)
    probabilities = (weights / total).astype(v.dtype)
    out = product("bhnm,bmhe->bnhe", probabilities, values).astype(v.dtype)
    lse = jnp.swapaxes((largest + jnp.log(total))[..., 0], 1, 2)
    return out.reshape(*q.shape[:-1], v.shape[-1]), lse.reshape(q.shape[:-1])


def backward(
    q: Float[Array, "B *S H D"],
    k: Float[Array, "B *S K D"],
    v: Float[Array, "B *S K E"],
    bias: Float[Array, "H ..."] | None,
    extra_keys: Float[Array, "B M K D"] | None,
    extra_values: Float[Array, "B M K E"] | None,
    out: Float[Array, "B *S H E"],
    lse: Float[Array, "B *S H"],
    d_out: Float[Array, "B *S H E"],
    d_lse: Float[Array, "B *S H"] | None,
    *,
    pattern: Pattern,
    scale: float,
) -> Gradients:
    """Gradients of the six arrays, each in its dtype (None for None): those of `forward` by differentiating it."""

    def run(*arrays: Any) -> tuple[Array, Array]:
        return forward(*arrays, pattern=pattern, scale=scale)

    _, pullback = jax.vjp(run, q, k, v, bias, extra_keys, extra_values)
    return pullback((d_out.astype(out.dtype), jnp.zeros_like(lse) if d_lse is None else d_lse))


def _all(array: Array, extra: Array | None, heads: int) -> Float[Array, "B M H D"]:
    """The tokens of a map one after the other, extra ones behind them, key heads repeated for their query heads."""
    flat = array.reshape(array.shape[0], -1, *array.shape[-2:])
    flat = flat if extra is None else jnp.concatenate([flat, extra], axis=1)
    return flat if flat.shape[2] == heads else jnp.repeat(flat, heads // flat.shape[2], axis=2)


def spread_bias(pattern: Pattern, bias: Float[Array, "H ..."]) -> Float[Array, "H N N"]:
    """The bias of each query and key that it sees, zero elsewhere.

    A product with ones and zeros for each axis spreads it, since TPUs gather slowly and scatter slower.
    """
    spread = bias.astype(jnp.float32)
    for axis in pattern.axes:
        # The first axis left of the table becomes two axes behind all others.
        spread = jnp.tensordot(spread, _positions(axis), ((1,), (0,)), precision=jax.lax.Precision.HIGHEST)
    rank = len(pattern.axes)
    order = (0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2))
    return spread.transpose(order).reshape(bias.shape[0], pattern.tokens, pattern.tokens)


def _positions(axis: Axis) -> Float[np.ndarray, "R L L"]:
    """One where a query sees a key at that relative position."""
    members = np.arange(axis.length) // axis.dilation
    entry = members - members[:, None] + axis.window - 1
    return ((np.arange(2 * axis.window - 1)[:, None, None] == entry) & axis.mask).astype(np.float32)
