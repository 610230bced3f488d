"""Dense attention on NVIDIA GPUs by cuDNN through `jax.nn.dot_product_attention`, which keeps no map.

Its public interface hands out no results to differentiate from, so the backward pass runs the forward kernel again.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jaxtyping import Array, Float


def refuse(q: Any, k: Any, v: Any, *, beside: tuple[str, ...]) -> str | None:
    """Why these arguments cannot be had, in the words of JAX; None: they can."""
    if beside:
        return f"has no {' and no '.join(beside)} here"
    inputs = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (q, k, v)]
    try:
        # The backward pass has limits of its own.
        out = jax.eval_shape(functools.partial(_attend, scale=1.0), *inputs)
        jax.eval_shape(functools.partial(backward, scale=1.0), *inputs, out)
    except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
        return str(error).partition("\n")[0]
    return None


def forward(
    q: Float[Array, "B N H D"], k: Float[Array, "B M H D"], v: Float[Array, "B M H E"], *, scale: float
) -> tuple[Float[Array, "B N H E"]]:
    """The output."""
    return (_attend(q, k, v, scale),)


def backward(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M H D"],
    v: Float[Array, "B M H E"],
    d_out: Float[Array, "B N H E"],
    *,
    scale: float,
) -> tuple[Float[Array, "B N H D"], Float[Array, "B M H D"], Float[Array, "B M H E"]]:
    """Gradients of q, k, v."""
    return jax.vjp(functools.partial(_attend, scale=scale), q, k, v)[1](d_out)


def _attend(q: Array, k: Array, v: Array, scale: float) -> Array:
    return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")
