"""Neighborhood attention where the pattern cuts the map into windows: dense products in each window, by the compiler.

Along every axis either the stride is the window, and blocks do not see each other, or a window is a whole group of the
dilation; so MaxViT's block and grid attention (arXiv:2204.01697), and Swin's without shift. All pairs of a window are
computed at a time, so windows are small. Arguments and results of the three functions: docs/neighborhood.md.

Letters in shapes: G windows of all examples, N tokens of a window.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attn.common.relative import relative_position_bias
from attn.core.numerics import product
from kernels.neighborhood.pattern import Pattern

Gradients = tuple[Array, Array, Array, Array | None, Array | None, Array | None]

LARGEST = 256
"""Tokens of a window, above which tiles are faster on a CPU (docs/kernels_window.md)."""


def unprofitable(
    q: Any, k: Any, v: Any, bias: Any = None, extra_keys: Any = None, extra_values: Any = None, *, pattern: Pattern
) -> str | None:
    """Why these arguments are faster in tiles; None if they are not."""
    reason = _not_windows(pattern)
    if reason is None and math.prod(pattern.window) > LARGEST:
        reason = f"windows of {math.prod(pattern.window)} tokens; above {LARGEST} tiles are faster"
    return reason


def refuse(
    q: Any, k: Any, v: Any, bias: Any = None, extra_keys: Any = None, extra_values: Any = None, *, pattern: Pattern
) -> str | None:
    """Why these arguments cannot be had here; None if they can."""
    return _not_windows(pattern) or ("extra keys" if extra_keys is not None else None)


def _not_windows(pattern: Pattern) -> str | None:
    for axis in pattern.axes:
        members = axis.length // axis.dilation
        whole = axis.length % axis.dilation == 0 and members % axis.window == 0
        if axis.is_causal or not whole or (members > axis.window and axis.stride < axis.window):
            return "the pattern does not cut the map into windows that do not see each other"
    return None


def forward(
    q: Float[Array, "B *S H D"],
    k: Float[Array, "B *S K D"],
    v: Float[Array, "B *S K E"],
    bias: Float[Array, "H ..."] | None,
    extra_keys: None,
    extra_values: None,
    *,
    pattern: Pattern,
    scale: float,
) -> tuple[Float[Array, "B *S H E"], Float[Array, "B *S H"]]:
    """Output in the dtype of `v`, and the logsumexp of every query in float32."""
    heads = q.shape[-2]
    queries, keys, values = (_to_windows(x, pattern, heads) for x in (q, k, v))
    logits = scale * product("ghnd,ghmd->ghnm", queries, keys)
    if bias is not None:
        logits = logits + relative_position_bias(bias, pattern.window)
    largest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp(logits - largest)
    total = weights.sum(axis=-1, keepdims=True)
    out = product("ghnm,ghme->ghne", (weights / total).astype(v.dtype), values)
    lse = largest + jnp.log(total)
    return _from_windows(out.astype(v.dtype), q, pattern), _from_windows(lse, q, pattern)[..., 0]


def backward(
    q: Float[Array, "B *S H D"],
    k: Float[Array, "B *S K D"],
    v: Float[Array, "B *S K E"],
    bias: Float[Array, "H ..."] | None,
    extra_keys: None,
    extra_values: None,
    out: Float[Array, "B *S H E"],
    lse: Float[Array, "B *S H"],
    d_out: Float[Array, "B *S H E"],
    d_lse: Float[Array, "B *S H"] | None,
    *,
    pattern: Pattern,
    scale: float,
) -> Gradients:
    """Gradients of the six arrays, each in its dtype (None for None): those of `forward` by differentiating it."""

    def run(q: Array, k: Array, v: Array, bias: Array | None) -> tuple[Array, Array]:
        return forward(q, k, v, bias, None, None, pattern=pattern, scale=scale)

    _, pullback = jax.vjp(run, q, k, v, bias)
    return *pullback((d_out.astype(out.dtype), jnp.zeros_like(lse) if d_lse is None else d_lse)), None, None


def _to_windows(x: Float[Array, "B *S K F"], pattern: Pattern, heads: int) -> Float[Array, "G H N F"]:
    """Windows one after the other, key heads repeated for their query heads.

    Heads before the tokens of a window make every product contiguous.
    """
    x = x if x.shape[-2] == heads else jnp.repeat(x, heads // x.shape[-2], axis=-2)
    split, order = _orders(pattern)
    x = x.reshape(x.shape[0], *split, heads, x.shape[-1]).transpose(order)
    return x.reshape(-1, heads, math.prod(pattern.window), x.shape[-1])


def _from_windows(x: Float[Array, "G H N F"], like: Any, pattern: Pattern) -> Float[Array, "B *S H F"]:
    """The inverse of `_to_windows`, for maps of the shape of `like`."""
    split, order = _orders(pattern)
    sizes = [like.shape[0], *split, *x.shape[1::2]]
    back = [order.index(axis) for axis in range(len(order))]
    x = x.reshape([sizes[axis] for axis in order]).transpose(back)
    return x.reshape(like.shape[0], *pattern.shape, *x.shape[-2:])


def _orders(pattern: Pattern) -> tuple[list[int], list[int]]:
    """What the axes of the map split into: blocks, members of a window, groups of the dilation; and the order of axes.

    The order is that of `[G, H, N, F]` from `[B, *split, H, F]`.
    """
    split = []
    for axis in pattern.axes:
        split += [axis.length // axis.dilation // axis.window, axis.window, axis.dilation]
    rank = len(pattern.axes)
    outside = [1 + 3 * axis + part for axis in range(rank) for part in (0, 2)]
    inside = [2 + 3 * axis for axis in range(rank)]
    return split, [0, *outside, 1 + 3 * rank, *inside, 2 + 3 * rank]
