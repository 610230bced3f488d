"""The product of tokens and a weight, whose gradient is computed as each platform does it best.

The gradient of a weight sums over all tokens of all examples, `[B, N, I]` and `[B, N, O]`. As two matrices of rows,
`[B * N, I]` and `[B * N, O]`, XLA's CPU backend takes a third less time for a train step (docs/benchmarks.md). On a TPU
an example of 197 tokens fills no whole tiles, and making rows of them is a copy of each. So it is one equation that is
lowered by platform.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float


@jax.custom_jvp
def times(x: Float[Array, "*B I"], kernel: Float[Array, I * O]) -> Float[Array, "*B *O"]:
    """`x` times `kernel`, over the last axis of the one and the first of the other."""
    return _times(x, kernel)


@functools.partial(times.defjvp, symbolic_zeros=True)
def _times_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, Any]:
    (x, kernel), (d_x, d_kernel) = primals, tangents
    parts = [] if isinstance(d_x, SymbolicZero) else [_times(d_x, kernel)]
    if not isinstance(d_kernel, SymbolicZero):
        parts.append(_bind(_times_p, x, d_kernel))
    out = _times(x, kernel)
    return out, sum(parts[1:], parts[0]) if parts else SymbolicZero.from_primal_value(out)


def _times(x: Any, kernel: Any) -> Any:
    return lax.dot_general(x, kernel, _last_and_first(x, kernel))


def _gradient(x: Any, cotangent: Any) -> Any:
    """Of a kernel, in the shapes that are given."""
    return lax.dot_general(x, cotangent, _leading(x, cotangent))


def _gradient_by_rows(x: Any, cotangent: Any) -> Any:
    return _gradient(x.reshape(-1, x.shape[-1]), cotangent.reshape(-1, *cotangent.shape[x.ndim - 1 :]))


def _last_and_first(x: Any, kernel: Any) -> Any:
    return ((x.ndim - 1,), (0,)), ((), ())


def _leading(x: Any, cotangent: Any) -> Any:
    axes = tuple(range(x.ndim - 1))
    return (axes, axes), ((), ())


# --- the equations ----------------------------------------------------------------------------------------------------


def _bind(primitive: core.Primitive, *arrays: Any) -> Any:
    # What is said about precision where the program is traced is not known any more where it is lowered.
    return primitive.bind(*arrays, precision=jax.config.values["jax_default_matmul_precision"])


def _primitive(name: str, axes: Any, function: Any, by_platform: dict[str, Any]) -> core.Primitive:
    made = core.Primitive(name)

    def under(function: Any) -> Any:
        def run(*arrays: Any, precision: Any) -> Any:
            with jax.default_matmul_precision(precision):
                return function(*arrays)

        return run

    def abstract(x: Any, y: Any, *, precision: Any) -> Any:
        options = {"precision": None, "preferred_element_type": None, "out_sharding": None}
        found: Any = lax.dot_general_p.abstract_eval(x, y, dimension_numbers=axes(x, y), **options)
        return found[0]

    def batched(arrays: Any, dims: Any, *, precision: Any) -> Any:
        with jax.default_matmul_precision(precision):
            return jax.vmap(function, dims)(*arrays), 0

    made.def_impl(jax.jit(under(function), static_argnames="precision"))
    made.def_abstract_eval(abstract)
    batching.primitive_batchers[made] = batched
    mlir.register_lowering(made, mlir.lower_fun(under(function), multiple_results=False))
    for platform, own in by_platform.items():
        mlir.register_lowering(made, mlir.lower_fun(under(own), multiple_results=False), platform=platform)
    return made


_times_p = _primitive("times", _last_and_first, _times, {})
_gradient_p = _primitive("weight_gradient", _leading, _gradient_by_rows, {"tpu": _gradient})


def _of_x(cotangent: Any, x: Any, kernel: Any, **_: Any) -> Any:
    outputs = tuple(range(x.aval.ndim - 1, cotangent.ndim)), tuple(range(1, kernel.ndim))
    return lax.dot_general(cotangent, kernel, (outputs, ((), ())))


def _of_factor(cotangent: Any, x: Any, other: Any, **_: Any) -> Any:
    outputs = tuple(range(other.ndim - cotangent.ndim + 1, other.ndim)), tuple(range(1, cotangent.ndim))
    return lax.dot_general(other, cotangent, (outputs, ((), ())))


ad.defbilinear(_times_p, _of_x, lambda cotangent, x, kernel, **_: _bind(_gradient_p, x, cotangent))
ad.defbilinear(_gradient_p, _of_factor, lambda cotangent, x, other, **_: _times(x, cotangent))


def multiply_adds(eqn: core.JaxprEqn) -> int:
    """Of an equation of this module."""
    x, _, out = (variable.aval.shape for variable in (*eqn.invars, *eqn.outvars))  # type: ignore[attr-defined]
    contracted = x[-1:] if eqn.primitive is _times_p else x[:-1]
    return math.prod(contracted) * math.prod(out)


EQUATIONS = (_times_p, _gradient_p)
"""The primitives."""
