"""How the arrays of a model are spread over a mesh with the axes `data`, `fsdp` and `tensor`.

A layer says once which axis of its parameter is split over `tensor` (`Split`); `parameter_spec` adds the axis that is
split over `fsdp`. Training stores parameters, optimizer state and averages so, and a layer asks for the form that it
computes with: `gathered` over `fsdp`, in the dtype of the computation. Activations are split over the batch, and
between the two matrix products of a pair over heads or hidden units (Megatron-LM, arXiv:1909.08053).

Nothing here knows devices: a computation that is traced under a mesh (`jax.sharding.use_abstract_mesh`) is constrained
to it, and without one every function does nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from models.core.remat import LINEAR
from models.core.times import times

BATCH = ("data", "fsdp")
TENSOR = "tensor"


@dataclasses.dataclass(frozen=True)
class Split:
    """Which axis of a parameter is split over `tensor`.

    Attributes:
      axis: counted from the end, so that a leading axis of scanned layers does not matter.
      units: of what the axis consists (heads, hidden units); they cannot be cut.
      what: name of the units, for an error.
    """

    axis: int
    units: int
    what: str


def parameter(value: jax.Array, split: Split | None = None) -> nnx.Param:
    """A parameter that knows how it is split over `tensor`."""
    return nnx.Param(value) if split is None else nnx.Param(value, tensor_split=split)


def rules(model: nnx.Module) -> dict[str, Split]:
    """The splits of a model's parameters by name, as `models.split` names them."""
    _, leaves = nnx.split(model, nnx.Param, ...)[:2]
    found = {}
    for path, variable in nnx.to_flat_state(leaves):
        if (split := variable.get_metadata().get("tensor_split")) is not None:
            found[".".join(map(str, path))] = split
    return found


def parameter_spec(shape: Sequence[int], split: Split | None, ways: Mapping[str, int]) -> PartitionSpec:
    """How one layer's parameter is stored.

    The axis of `split` over `tensor`; of a matrix, the largest other axis that divides over `fsdp`. Vectors stay whole
    unless `split` says otherwise: they are small, and a collective for each would cost more than their memory.

    Args:
      shape: without an axis of scanned layers.
      ways: sizes of the mesh axes by name.

    Raises:
      ValueError: the devices do not divide the units of the split.
    """
    axes: list[str | None] = [None] * len(shape)
    tensor, fsdp = ways.get("tensor", 1), ways.get("fsdp", 1)
    # A part of an optimizer's state may have another shape than the parameter: factors of a matrix, for one.
    fits = split is not None and -len(shape) <= split.axis < len(shape) and shape[split.axis] % split.units == 0
    if split is not None and fits and tensor > 1:
        if split.units % tensor:
            raise ValueError(
                f"config.mesh.tensor={tensor}: does not divide the {split.units} {split.what} of this model"
            )
        axes[split.axis] = "tensor"
    if fsdp > 1 and sum(size > 1 for size in shape) > 1:
        free = [i for i, size in enumerate(shape) if axes[i] is None and size > 1 and size % fsdp == 0]
        if free:
            axes[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*axes)


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """`x` split over mesh axes, one entry per array axis: a name, a tuple of names or None.

    What the ambient mesh does not have, or cannot divide an axis by, is left out.
    """
    ways = _ways()
    # What is no part of a program (weights that a `shard_map` closes over) lies where it lies.
    if not ways or not isinstance(x, jax.core.Tracer):
        return x

    def possible(entry: Any, size: int) -> Any:
        names = [name for name in (entry if isinstance(entry, tuple) else (entry,)) if ways.get(name, 1) > 1]
        total = 1
        for name in names:
            total *= ways[name]
        return tuple(names) if names and size % total == 0 else None

    spec = PartitionSpec(*(possible(entry, size) for entry, size in zip(axes, x.shape, strict=True)))
    return jax.lax.with_sharding_constraint(x, spec)


def over_batch(x: jax.Array) -> jax.Array:
    """Activations `[B, ...]`: the batch over `data` and `fsdp`, everything else whole."""
    return constrain(x, BATCH, *[None] * (x.ndim - 1))


def tensor_ways() -> int:
    """Devices over which matrices are split; 1 without a mesh."""
    return _ways().get(TENSOR, 1)


def gathered(variable: nnx.Variable, dtype: Any) -> Any:
    """A parameter as it is computed with: in `dtype`, whole over `fsdp`, split over `tensor` as it is stored.

    An array of JAX, or of NumPy where a model is exported with its parameters.
    The conversion comes before the gather, which so moves 16-bit numbers in a 16-bit computation. Its gradient is
    brought to the stored form at once: a reduce-scatter, not an all-reduce of the whole.
    """
    value = variable[...]
    ways = _ways()
    if not ways:
        return value.astype(dtype)
    stored = parameter_spec(value.shape, variable.get_metadata().get("tensor_split"), ways)
    return _gathered(value, jnp.dtype(dtype), stored)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(value: jax.Array, dtype: Any, stored: PartitionSpec) -> jax.Array:
    return constrain(value.astype(dtype), *(axis if axis == TENSOR else None for axis in _padded(stored, value.ndim)))


def _gathered_forward(value: jax.Array, dtype: Any, stored: PartitionSpec) -> tuple[jax.Array, jax.Array]:
    return _gathered(value, dtype, stored), jnp.zeros((), value.dtype)


def _gathered_backward(dtype: Any, stored: PartitionSpec, like: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (constrain(gradient, *_padded(stored, gradient.ndim)).astype(like.dtype),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def product(
    x: jax.Array,
    kernel: nnx.Variable,
    dtype: Any,
    arrange: Callable[[jax.Array], jax.Array] = lambda kernel: kernel,
    result: Any = None,
) -> jax.Array:
    """`x` times a gathered kernel, over the last axis of x and the first of the kernel.

    The backward pass gathers the kernel again: kept, the layers of a stack together would be the whole model on every
    device.

    Args:
      dtype: of the factors, and of the gradient where it meets them.
      arrange: brings the gathered kernel into the form to multiply with.
      result: a wider dtype, in which the products are summed and returned; `dtype` unless given.
    """
    ways = _ways()

    def multiply(x: jax.Array, stored: jax.Array) -> jax.Array:
        whole = _gathered(stored, jnp.dtype(dtype), spec) if ways else stored.astype(dtype)
        x, whole = x.astype(dtype), arrange(whole)
        return times(x, whole) if result is None or result == dtype else _times_wide(result, x, whole)

    value = kernel[...]
    spec = parameter_spec(value.shape, kernel.get_metadata().get("tensor_split"), ways)
    return checkpoint_name((_from_inputs if "fsdp" in spec else _plainly)(multiply, x, value), LINEAR)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _times_wide(result: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The product in a wider dtype than its factors have."""
    return jnp.tensordot(x, kernel, 1, preferred_element_type=result)


@_times_wide.defjvp
def _times_wide_jvp(result: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # JAX's own rule would multiply the wide gradient with the narrow factors, which is a product of float32 numbers.
    (x, kernel), (d_x, d_kernel) = primals, tangents
    tangent = times(d_x, kernel) + times(x, d_kernel)
    return _times_wide(result, x, kernel), tangent.astype(result)


def _plainly(function: Callable, *arguments: jax.Array) -> jax.Array:
    return function(*arguments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _from_inputs(function: Callable, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`function(x, kernel)`, of which only the two are kept for the backward pass."""
    return function(x, kernel)


def _from_inputs_forward(function: Callable, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
    return function(x, kernel), (x, kernel)


def _from_inputs_backward(function: Callable, kept: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Without the barrier the compiler may take both gathers for one, and keep its result in between.
    (x, kernel), gradient = jax.lax.optimization_barrier((kept, gradient))
    return jax.vjp(function, x, kernel)[1](gradient)


_from_inputs.defvjp(_from_inputs_forward, _from_inputs_backward)


def _padded(spec: PartitionSpec, ndim: int) -> tuple[Any, ...]:
    return tuple(spec) + (None,) * (ndim - len(spec))


def _ways() -> dict[str, int]:
    """Sizes of the ambient mesh's axes; empty without a mesh, or with one device. Axes that a `shard_map` around has
    taken are not there: inside of it every array is a device's own part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return {}
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in axes if kind == jax.sharding.AxisType.Auto}
