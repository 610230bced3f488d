"""Neighborhood attention on NVIDIA GPUs: Pallas kernels for Triton, forward and backward.

The backend is named in every call (`compiler_params` of Pallas for Triton), since a plain Pallas call for CUDA goes to
another one. Arrays are read where they lie, heads last; nothing is padded, permuted or repeated in memory.

Sources: Neighborhood Attention (arXiv:2204.07143), dilated (arXiv:2209.15001), strided (arXiv:2504.16922).
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.interpreter import interpreted
from kernels.neighborhood import gpu_backward, gpu_bias, gpu_extra, gpu_forward
from kernels.neighborhood.gpu_choice import Tile, choose
from kernels.neighborhood.pattern import Pattern

DTYPES = ("float32", "bfloat16", "float16")
LARGEST_HEAD = 256


def refuse(
    q: Any, k: Any, v: Any, bias: Any = None, extra_keys: Any = None, extra_values: Any = None, *, pattern: Pattern
) -> str | None:
    """Why these arguments (anything with shape and dtype) cannot be had here; None if they can."""
    arrays = [array for array in (q, k, v, extra_keys, extra_values) if array is not None]
    dtypes = sorted({str(jnp.dtype(array.dtype)) for array in arrays})
    if len(dtypes) > 1:
        return f"q, k, v and extra keys and values must have one dtype, got {', '.join(dtypes)}"
    if dtypes[0] not in DTYPES:
        return f"dtype {dtypes[0]}; allowed: {', '.join(DTYPES)}"
    if len(pattern.axes) > 3:
        return f"a map of {len(pattern.axes)} axes; allowed: 1 to 3"
    widest = max(q.shape[-1], v.shape[-1])
    if widest > LARGEST_HEAD:
        return f"head dim {widest}; allowed: up to {LARGEST_HEAD}"
    if pattern.tokens >= 2**31 or any(math.prod(array.shape) >= 2**31 for array in arrays):
        return "an array of 2**31 elements or more: positions in it are 32-bit integers"
    return None


def forward(
    q: Float[Array, "B *S H D"],
    k: Float[Array, "B *S K D"],
    v: Float[Array, "B *S K E"],
    bias: Float[Array, "H ..."] | None = None,
    extra_keys: Float[Array, "B M K D"] | None = None,
    extra_values: Float[Array, "B M K E"] | None = None,
    *,
    pattern: Pattern,
    scale: float,
    tile: Tile | None = None,
) -> tuple[Float[Array, "B *S H E"], Float[Array, "B *S H"]]:
    """Output in the dtype of v, and the natural logsumexp of the logits in float32.

    Args:
      bias: added to the scaled logits; index `key - query + window - 1`, in members, an axis each.
      extra_keys, extra_values: seen by every query, without bias.
      tile: shape of a program's work instead of `gpu_choice.choose`.
    """
    tile = tile or choose(pattern, q.shape[-1], v.shape[-1], q.dtype.itemsize)
    out, lse = gpu_forward.forward(
        _flat(q),
        _flat(k),
        _flat(v),
        None if bias is None else bias.reshape(bias.shape[0], -1),
        extra_keys,
        extra_values,
        pattern=pattern,
        scale=scale,
        tile=tile,
        interpret=interpreted.value,
    )
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
    tile: Tile | None = None,
    key_tile: Tile | None = None,
) -> tuple[Any, ...]:
    """Gradients of q, k, v, bias, extra_keys, extra_values, in their dtypes; None for what is None.

    Args:
      out, lse: of the forward pass; d_out, d_lse: their cotangents (None: the logsumexp has none).
      tile, key_tile: shapes of a program's work for dQ and for dK with dV, instead of `gpu_choice.choose`.
    """
    sizes = q.shape[-1], v.shape[-1], q.dtype.itemsize
    tile = tile or choose(pattern, *sizes)
    key_tile = key_tile or choose(pattern, *sizes, reverse=True)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    if d_lse is not None:
        delta = delta - d_lse
    inputs = {
        "q": _flat(q),
        "k": _flat(k),
        "v": _flat(v),
        "bias": None if bias is None else bias.reshape(bias.shape[0], -1),
        "extra_keys": extra_keys,
        "extra_values": extra_values,
        "d_out": _flat(d_out.astype(v.dtype)),
        "lse": lse.reshape(lse.shape[0], -1, lse.shape[-1]),
        "delta": delta.reshape(delta.shape[0], -1, delta.shape[-1]),
    }
    interpret = interpreted.value
    dq = gpu_backward.query_gradient(inputs, pattern=pattern, scale=scale, tile=tile, interpret=interpret)
    dk, dv = gpu_backward.key_gradients(inputs, pattern=pattern, scale=scale, tile=key_tile, interpret=interpret)
    d_bias = d_extra_keys = d_extra_values = None
    if bias is not None:
        d_bias = gpu_bias.bias_gradient(inputs, pattern=pattern, scale=scale, tile=tile, interpret=interpret)
        d_bias = d_bias.reshape(bias.shape).astype(bias.dtype)
    if extra_keys is not None:
        d_extra_keys, d_extra_values = gpu_extra.extra_gradients(inputs, scale=scale, tile=tile, interpret=interpret)
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape), d_bias, d_extra_keys, d_extra_values


def _flat(array: Float[Array, "B *S H D"]) -> Float[Array, "B N H D"]:
    """Tokens in row-major order; no data moves."""
    return array.reshape(array.shape[0], -1, *array.shape[-2:])
