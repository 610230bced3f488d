"""Neighborhood attention for reading and checking: every query gathers each of its keys.

Memory is tokens x window x heads x head dim, forward and backward, and the gathers are slow on every platform;
`attn.neighborhood.xla` is the one to run. Arguments and results of the three functions: docs/neighborhood.md.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernels.neighborhood.pattern import Axis, Pattern

Gradients = tuple[Array, Array, Array, Array | None, Array | None, Array | None]


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
    """Output in the dtype of `v`, and the logsumexp of every query in float32. Computed in float32 throughout."""
    batch, heads, kv_heads = q.shape[0], q.shape[-2], k.shape[-2]
    keys, valid, relative = tables(pattern)
    # Query head h is (h // G, h % G) and reads key head h // G.
    queries = q.reshape(batch, pattern.tokens, kv_heads, heads // kv_heads, -1).astype(jnp.float32)

    def gathered(array: Array, extra: Array | None) -> Float[Array, "B N W K D"]:
        near = array.reshape(batch, pattern.tokens, kv_heads, -1)[:, keys]
        if extra is not None:
            everywhere = (batch, pattern.tokens, *extra.shape[1:])
            near = jnp.concatenate([near, jnp.broadcast_to(extra[:, None], everywhere)], axis=2)
        return near.astype(jnp.float32)

    highest = jax.lax.Precision.HIGHEST
    logits = scale * jnp.einsum("bnhgd,bnwhd->bhgnw", queries, gathered(k, extra_keys), precision=highest)
    near, extra = jnp.split(logits, [keys.shape[1]], axis=-1)
    if bias is not None:
        near += bias.reshape(kv_heads, heads // kv_heads, -1)[..., relative]
    logits = jnp.concatenate([jnp.where(valid, near, -jnp.inf), extra], axis=-1)
    lse = jax.nn.logsumexp(logits, axis=-1)
    probabilities = jnp.exp(logits - lse[..., None])
    out = jnp.einsum("bhgnw,bnwhe->bnhge", probabilities, gathered(v, extra_values), precision=highest)
    return out.reshape(*q.shape[:-1], -1).astype(v.dtype), jnp.moveaxis(lse, 3, 1).reshape(q.shape[:-1])


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


def tables(pattern: Pattern) -> tuple[Int[np.ndarray, "N W"], Bool[np.ndarray, "N W"], Int[np.ndarray, "N W"]]:
    """For each query and each place in its window: flat index of the key, whether it is one, index of its bias.

    The index of the bias counts in a flattened table of relative positions.
    """
    tables_of_axes = [_axis_tables(axis) for axis in pattern.axes]
    rank = len(tables_of_axes)

    def over_axes(which: int) -> list[np.ndarray]:
        """One kind of table of all axes, `[L, w]` each, as arrays of shape `[*S, *window]`."""
        spread = []
        for number, own in enumerate(tables_of_axes):
            others = tuple(axis for axis in range(2 * rank) if axis % rank != number)
            spread.append(np.expand_dims(own[which], others))
        return [table.reshape(pattern.tokens, -1) for table in np.broadcast_arrays(*spread)]

    keys = np.ravel_multi_index(over_axes(0), pattern.shape)
    relative = np.ravel_multi_index(over_axes(2), pattern.bias_shape)
    return keys, np.all(over_axes(1), axis=0), relative


def _axis_tables(axis: Axis) -> tuple[Int[np.ndarray, "L W"], Bool[np.ndarray, "L W"], Int[np.ndarray, "L W"]]:
    tokens = np.arange(axis.length)
    first, end = (bound[:, None] for bound in axis.interval(tokens))
    places = first + np.arange(axis.window)
    members = np.minimum(places, end - 1)  # a causal window may have fewer members than places
    member, group = tokens[:, None] // axis.dilation, tokens[:, None] % axis.dilation
    return group + axis.dilation * members, places < end, members - member + axis.window - 1
