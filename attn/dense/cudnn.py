"""Dense attention on NVIDIA GPUs by cuDNN through `jax.nn.dot_product_attention`, which keeps no map.

Its public interface hands out no results to differentiate from, so the backward pass runs the forward kernel again.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

LARGEST_HEAD = 128


def refuse(q: Any, k: Any, v: Any, *, with_lse: bool) -> str | None:
    """Why these arguments cannot be had; None: they can."""
    if with_lse:
        return "the logsumexp, which cuDNN hands out in half precision only"
    if q.dtype.name not in ("bfloat16", "float16"):
        return f"dtype {q.dtype}; cuDNN takes bfloat16 and float16"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] > LARGEST_HEAD or q.shape[-1] % 8:
        return f"head dims {q.shape[-1]} and {v.shape[-1]}; cuDNN takes one, a multiple of 8 up to {LARGEST_HEAD}"
    return None


@functools.cache
def unavailable() -> str | None:
    """Why no program can be lowered to it on this machine, in the words of JAX; None: it can."""
    small = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.bfloat16)
    try:
        jax.eval_shape(functools.partial(_attend, scale=1.0), small, small, small)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"this machine lowers nothing to cuDNN: {str(error).partition(chr(10))[0]}"
    return None


def forward(q: Array, k: Array, v: Array, *, scale: float, with_lse: bool) -> tuple[Array]:
    """The output."""
    return (_attend(q, k, v, scale=scale),)


def backward(
    q: Array, k: Array, v: Array, *cotangents: Any, scale: float, with_lse: bool
) -> tuple[Array, Array, Array]:
    """Gradients of q, k, v. cuDNN has them for even numbers of tokens: one more is put there, and not looked at."""
    lengths: dict[str, Any] = {}
    if q.shape[1] % 2 or k.shape[1] % 2:
        lengths["query_seq_lengths"] = jnp.full(q.shape[0], q.shape[1], jnp.int32)
        lengths["key_value_seq_lengths"] = jnp.full(q.shape[0], k.shape[1], jnp.int32)
    attend = functools.partial(_attend, scale=scale, **lengths)
    gradients = jax.vjp(attend, *map(_even, (q, k, v)))[1](_even(cotangents[0]))
    dq, dk, dv = (gradient[:, : x.shape[1]] for gradient, x in zip(gradients, (q, k, v), strict=True))
    return dq, dk, dv


def _attend(q: Array, k: Array, v: Array, *, scale: float, **lengths: Any) -> Array:
    return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn", **lengths)


def _even(x: Array) -> Array:
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))
