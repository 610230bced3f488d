"""Depthwise convolution, by XLA's own on accelerators and as a sum of shifted maps on CPUs.

XLA's CPU backend has no fast path for convolutions of many groups, least of all for their gradients: this one takes a
sixth to an eighteenth of the time (docs/families/maxvit.md, speed on a CPU).
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from models.core import summary
from models.core.onnx import convert

Pair = tuple[int, int]
Pads = tuple[Pair, Pair]
MOST = 49
"""Entries of a kernel up to which this pays: there is a shifted map for each of them."""


def depthwise(
    x: Float[Array, "B Y X C"], kernel: Float[Array, "k l 1 C"], stride: Pair, pads: Pads, dilation: Pair = (1, 1)
) -> Float[Array, "B V U C"]:
    """Every channel convolved with its own kernel, in the dtype of x.

    Args:
      stride: of rows and of columns.
      pads: rows before and after, columns before and after, of zeros.
      dilation: places from one entry of the kernel to the next, along rows and along columns.
    """
    shape, size = tuple(x.shape[1:3]), tuple(kernel.shape[:2])
    return _depthwise_p.bind(x, kernel, of="map", shape=shape, size=size, how=(stride, pads, dilation))


# One primitive of three bilinear functions. Each of them is the transpose of another, so there are derivatives of every
# kind and order, and all of them have the fast path.
_depthwise_p = core.Primitive("depthwise")
_COMPUTED = {"map": ("x", "kernel"), "gradient of map": ("y", "kernel"), "gradient of kernel": ("x", "y")}
"""What is computed -> of what: `y`, `x` or the kernel."""


def _bound(of: str, left: Array, right: Array, parameters: dict[str, Any]) -> Array:
    return _depthwise_p.bind(left, right, **{**parameters, "of": of})


@_depthwise_p.def_abstract_eval
def _(left: Any, right: Any, *, of: str, shape: Pair, size: Pair, how: Any) -> jax.core.ShapedArray:
    batch, channels = left.shape[0], left.shape[-1]
    if of == "map":
        rows, columns = (
            (side + sum(pads) - span) // step + 1
            for side, pads, span, step in zip(shape, how[1], spans(size, how[2]), how[0], strict=True)
        )
        return jax.core.ShapedArray((batch, rows, columns, channels), left.dtype)
    if of == "gradient of map":
        return jax.core.ShapedArray((batch, *shape, channels), left.dtype)
    return jax.core.ShapedArray((*size, 1, channels), left.dtype)


@functools.lru_cache(maxsize=1024)
def _jitted(**parameters: Any) -> Any:
    return jax.jit(functools.partial(_depthwise_p.bind, **parameters))


@_depthwise_p.def_impl
def _(left: Array, right: Array, **parameters: Any) -> Array:
    return _jitted(**parameters)(left, right)


def _to_left(cotangent: Array, left: Any, right: Array, **parameters: Any) -> Array:
    # Of map: x from y and kernel. Of its gradients: y from x and kernel, x from y and kernel.
    other = {"map": "gradient of map", "gradient of map": "map", "gradient of kernel": "gradient of map"}
    of = parameters["of"]
    return _bound(other[of], *((right, cotangent) if of == "gradient of kernel" else (cotangent, right)), parameters)


def _to_right(cotangent: Array, left: Array, right: Any, **parameters: Any) -> Array:
    of = parameters["of"]
    if of == "gradient of kernel":
        return _bound("map", left, cotangent, parameters)
    return _bound("gradient of kernel", *((left, cotangent) if of == "map" else (cotangent, left)), parameters)


ad.defbilinear(_depthwise_p, _to_left, _to_right)


def _on_cpu(left: Array, right: Array, *, of: str, shape: Pair, size: Pair, how: Any) -> Array:
    stride, pads, dilation = how
    if of == "map":
        return _shifted(left, right, stride=stride, pads=pads, dilation=dilation)
    if of == "gradient of map":
        return _to_map(right, left, shape, *how)
    return _to_kernel(left, size, right, *how)


def _elsewhere(left: Array, right: Array, *, of: str, shape: Pair, size: Pair, how: Any) -> Array:
    stride, pads, dilation = how
    convolved = functools.partial(_convolved, stride=stride, pads=pads, dilation=dilation)
    if of == "map":
        return convolved(left, right)
    channels = left.shape[-1]
    if of == "gradient of map":
        like = jax.ShapeDtypeStruct((left.shape[0], *shape, channels), left.dtype)
        return jax.linear_transpose(lambda x: convolved(x, right), like)(left)[0]
    like = jax.ShapeDtypeStruct((*size, 1, channels), left.dtype)
    return jax.linear_transpose(lambda kernel: convolved(left, kernel), like)(right)[0]


mlir.register_lowering(_depthwise_p, mlir.lower_fun(_elsewhere, multiple_results=False))
mlir.register_lowering(_depthwise_p, mlir.lower_fun(_on_cpu, multiple_results=False), platform="cpu")


def _batched(arrays: Sequence[Array], axes: Sequence[Any], **parameters: Any) -> tuple[Array, int]:
    """A mapped axis is more examples where the kernel has none, and more channels otherwise."""
    count = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
    names = _COMPUTED[parameters["of"]]
    if names[1] == "kernel" and axes[1] is None:
        first = jnp.moveaxis(arrays[0], axes[0], 0)
        found = _bound(parameters["of"], first.reshape(-1, *first.shape[2:]), arrays[1], parameters)
        return found.reshape(count, -1, *found.shape[1:]), 0

    def channels(x: Array, axis: Any) -> Array:
        x = jnp.broadcast_to(x, (count, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        x = jnp.moveaxis(x, 0, -2)
        return x.reshape(*x.shape[:-2], -1)

    left, right = map(channels, arrays, axes)
    found = _bound(parameters["of"], left, right, parameters)
    return found.reshape(*found.shape[:-1], count, -1), found.ndim - 1


batching.primitive_batchers[_depthwise_p] = _batched


def _multiply_adds(eqn: Any) -> int:
    """One for each entry of the kernel at every place of y."""
    y = {"map": eqn.outvars[0], "gradient of map": eqn.invars[0], "gradient of kernel": eqn.invars[1]}
    return math.prod(eqn.params["size"]) * math.prod(y[eqn.params["of"]].aval.shape)


summary.OF_PRIMITIVE[_depthwise_p] = _multiply_adds
convert.DEFINITIONS[_depthwise_p] = _elsewhere


def spans(size: Sequence[int], dilation: Pair) -> Pair:
    """Places along each axis from the first entry of a kernel to its last, both counted."""
    return dilation[0] * (size[0] - 1) + 1, dilation[1] * (size[1] - 1) + 1


def same_pads(shape: Sequence[int], size: Pair, stride: Pair, dilation: Pair = (1, 1)) -> Pads:
    """Zeros that TensorFlow's and XLA's `SAME` puts around a map."""
    (rows, columns) = (
        max((-(-side // step) - 1) * step + span - side, 0)
        for side, step, span in zip(shape, stride, spans(size, dilation), strict=True)
    )
    return (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2)


def _convolved(x: Array, kernel: Array, *, stride: Pair, pads: Pads, dilation: Pair) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        stride,
        pads,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _shifted(x: Array, kernel: Array, *, stride: Pair, pads: Pads, dilation: Pair) -> Array:
    """One product for each entry of the kernel, summed in float32."""
    size = kernel.shape[:2]
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = (
        (side - span) // step * step + 1
        for side, span, step in zip(padded.shape[1:3], spans(size, dilation), stride, strict=True)
    )
    weights = kernel.astype(jnp.float32)
    total = jnp.zeros((), jnp.float32)
    for row, column in itertools.product(*map(range, size)):
        down, right = row * dilation[0], column * dilation[1]
        place = padded[:, down : down + rows : stride[0]]
        place = place[:, :, right : right + columns : stride[1]]
        total = total + place.astype(jnp.float32) * weights[row, column, 0]
    return total.astype(x.dtype)


def _to_map(kernel: Array, gradient: Array, shape: Sequence[int], stride: Pair, pads: Pads, dilation: Pair) -> Array:
    """The gradient spread to the places it came from, convolved with the kernel turned about."""
    config = [(0, 0, 0)]
    sides = zip(shape, gradient.shape[1:3], stride, pads, spans(kernel.shape[:2], dilation), strict=True)
    for side, places, step, (before, _), span in sides:
        spread = (places - 1) * step + 1
        config.append((span - 1 - before, side + before - spread, step - 1))
    spread_out = jax.lax.pad(gradient, jnp.zeros((), gradient.dtype), (*config, (0, 0, 0)))
    return _shifted(spread_out, kernel[::-1, ::-1], stride=(1, 1), pads=((0, 0), (0, 0)), dilation=dilation)


def _to_kernel(x: Array, size: Pair, gradient: Array, stride: Pair, pads: Pads, dilation: Pair) -> Array:
    """Row by row of the gradient, with the rows of x that it came from: both stay in the cache."""
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = spans(size, dilation)[0], (gradient.shape[2] - 1) * stride[1] + 1

    def add(total: Array, row: Array) -> tuple[Array, None]:
        theirs = jax.lax.dynamic_index_in_dim(gradient, row, 1, keepdims=False).astype(jnp.float32)
        ours = jax.lax.dynamic_slice_in_dim(padded, row * stride[0], rows, 1).astype(jnp.float32)
        entries = [
            (ours[:, down, right : right + columns : stride[1]] * theirs).sum((0, 1))
            for down in range(0, rows, dilation[0])
            for right in range(0, size[1] * dilation[1], dilation[1])
        ]
        return total + jnp.stack(entries), None

    start = jnp.zeros((size[0] * size[1], x.shape[-1]), jnp.float32)
    total, _ = jax.lax.scan(add, start, jnp.arange(gradient.shape[1]))
    return total.reshape(*size, 1, x.shape[-1]).astype(x.dtype)
