"""Depthwise convolution, by XLA's own on accelerators and as a sum of shifted maps on CPUs.

XLA's CPU backend has no fast path for convolutions of many groups, least of all for their gradients: this one takes a
sixth to an eighteenth of the time (docs/maxvit.md, speed on a CPU).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Pads = tuple[tuple[int, int], tuple[int, int]]
LARGEST = 7
"""Side of a kernel up to which this pays: there is a shifted map for each of its entries."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise(
    x: Float[Array, "B Y X C"], kernel: Float[Array, "k k 1 C"], stride: int, pads: Pads
) -> Float[Array, "B V U C"]:
    """Every channel convolved with its own kernel, in the dtype of x. Differentiable in reverse mode, once.

    Args:
      pads: rows before and after, columns before and after, of zeros.
    """
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_shifted, stride=stride, pads=pads),
        default=functools.partial(_convolved, stride=stride, pads=pads),
    )


def _forward(x: Array, kernel: Array, stride: int, pads: Pads) -> tuple[Array, tuple[Array, Array]]:
    return depthwise(x, kernel, stride, pads), (x, kernel)


def _backward(stride: int, pads: Pads, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    def default(x: Array, kernel: Array, gradient: Array) -> tuple[Array, Array]:
        return jax.vjp(functools.partial(_convolved, stride=stride, pads=pads), x, kernel)[1](gradient)

    def cpu(x: Array, kernel: Array, gradient: Array) -> tuple[Array, Array]:
        return _to_map(kernel, gradient, x.shape[1:3], stride, pads), _to_kernel(x, kernel, gradient, stride, pads)

    return jax.lax.platform_dependent(*kept, gradient, cpu=cpu, default=default)


depthwise.defvjp(_forward, _backward)


def same_pads(shape: Sequence[int], size: int, stride: int) -> Pads:
    """Zeros that TensorFlow's and XLA's `SAME` puts around a map."""
    totals = [max((-(-side // stride) - 1) * stride + size - side, 0) for side in shape]
    (rows, columns) = ((total // 2, total - total // 2) for total in totals)
    return rows, columns


def _convolved(x: Array, kernel: Array, *, stride: int, pads: Pads) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _shifted(x: Array, kernel: Array, *, stride: int, pads: Pads) -> Array:
    """One product for each entry of the kernel, summed in float32."""
    size = kernel.shape[0]
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = ((side - size) // stride + 1 for side in padded.shape[1:3])
    weights = kernel.astype(jnp.float32)
    total = jnp.zeros((), jnp.float32)
    for down in range(size):
        for right in range(size):
            place = padded[:, down : down + (rows - 1) * stride + 1 : stride]
            place = place[:, :, right : right + (columns - 1) * stride + 1 : stride]
            total = total + place.astype(jnp.float32) * weights[down, right, 0]
    return total.astype(x.dtype)


def _to_map(kernel: Array, gradient: Array, shape: Sequence[int], stride: int, pads: Pads) -> Array:
    """The gradient spread to the places it came from, convolved with the kernel turned about."""
    size = kernel.shape[0]
    config = [(0, 0, 0)]
    for side, places, (before, _) in zip(shape, gradient.shape[1:3], pads, strict=True):
        spread = (places - 1) * stride + 1
        config.append((size - 1 - before, side + before - spread, stride - 1))
    spread_out = jax.lax.pad(gradient, jnp.zeros((), gradient.dtype), (*config, (0, 0, 0)))
    return _shifted(spread_out, kernel[::-1, ::-1], stride=1, pads=((0, 0), (0, 0)))


def _to_kernel(x: Array, kernel: Array, gradient: Array, stride: int, pads: Pads) -> Array:
    """Row by row of the gradient, with the rows of x that it came from: both stay in the cache."""
    size = kernel.shape[0]
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    columns = (gradient.shape[2] - 1) * stride + 1

    def add(total: Array, row: Array) -> tuple[Array, None]:
        theirs = jax.lax.dynamic_index_in_dim(gradient, row, 1, keepdims=False).astype(jnp.float32)
        ours = jax.lax.dynamic_slice_in_dim(padded, row * stride, size, 1).astype(jnp.float32)
        entries = [
            (ours[:, down, right : right + columns : stride] * theirs).sum((0, 1))
            for down in range(size)
            for right in range(size)
        ]
        return total + jnp.stack(entries), None

    start = jnp.zeros((size * size, x.shape[-1]), jnp.float32)
    total, _ = jax.lax.scan(add, start, jnp.arange(gradient.shape[1]))
    return total.reshape(kernel.shape).astype(kernel.dtype)
