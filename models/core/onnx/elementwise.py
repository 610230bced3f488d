"""Primitives that compute each element by itself: ONNX broadcasts their arguments, which so can stay small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from models.core.onnx.graph import Graph, Value, dtype_of, known, same

Make = Callable[..., Value]
"""`make(kind, *values, dtype=None, **attributes)`, a node of the least shape that its arguments allow."""


def _one(kind: str) -> Callable[..., Value]:
    return lambda make, eqn, *values: make(kind, *values)


def _compared(kind: str, negated: bool = False) -> Callable[..., Value]:
    def rule(make: Make, eqn: Any, one: Value, other: Value) -> Value:
        if one.dtype == bool:  # which only equality takes
            one, other = (make("Cast", value, dtype=np.int32, to=_INT32) for value in (one, other))
        found = make(kind, one, other, dtype=bool)
        return make("Not", found) if negated else found

    return rule


def _bitwise(of_bools: str) -> Callable[..., Value]:
    def rule(make: Make, eqn: Any, *values: Value) -> Value:
        if values[0].dtype != bool:
            raise NotImplementedError(f"{eqn.primitive.name} of {values[0].dtype}")
        return make(of_bools, *values)

    return rule


def _power(make: Make, eqn: Any, x: Value) -> Value:
    y = eqn.params["y"]
    if y == 2:
        return make("Mul", x, x)
    return make("Pow", x, known(np.asarray(y, x.dtype)))


def _cast(make: Make, eqn: Any, x: Value) -> Value:
    dtype = dtype_of(eqn.outvars[0].aval.dtype)
    return x if dtype == x.dtype else make("Cast", x, dtype=dtype, to=_KINDS[dtype.name])


def _finite(make: Make, eqn: Any, x: Value) -> Value:
    return make("Not", make("Or", make("IsNaN", x, dtype=bool), make("IsInf", x, dtype=bool)))


def _select(make: Make, eqn: Any, which: Value, *cases: Value) -> Value:
    if which.dtype != bool or len(cases) != 2:
        raise NotImplementedError(f"a choice among {len(cases)}")
    return make("Where", which, cases[1], cases[0], dtype=cases[0].dtype)


def _rounded(make: Make, eqn: Any, x: Value) -> Value:
    if eqn.params["rounding_method"] != jax.lax.RoundingMethod.TO_NEAREST_EVEN:
        raise NotImplementedError("rounding of halves away from zero")
    return make("Round", x)


def _remainder(make: Make, eqn: Any, one: Value, other: Value) -> Value:
    return make("Mod", one, other, fmod=1)  # of the sign of `one`, as JAX's


_INT32 = 6
_KINDS = {"float32": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": _INT32, "int64": 7, "bool": 9}
_KINDS |= {"float64": 11, "uint32": 12, "uint64": 13}
"""Numbers of ONNX's types (TensorProto.DataType)."""

RULES: dict[str, Callable[..., Value]] = {
    "add": _one("Add"),
    "add_any": _one("Add"),
    "sub": _one("Sub"),
    "mul": _one("Mul"),
    "div": _one("Div"),
    "max": _one("Max"),
    "min": _one("Min"),
    "pow": lambda make, eqn, x, y: make("Pow", x, y),
    "rem": _remainder,
    "round": _rounded,
    "abs": _one("Abs"),
    "neg": _one("Neg"),
    "sign": _one("Sign"),
    "exp": _one("Exp"),
    "log": _one("Log"),
    "sqrt": _one("Sqrt"),
    "sin": _one("Sin"),
    "cos": _one("Cos"),
    "tanh": _one("Tanh"),
    "erf": _one("Erf"),
    "floor": _one("Floor"),
    "ceil": _one("Ceil"),
    "logistic": _one("Sigmoid"),
    "exp2": lambda make, eqn, x: make("Pow", known(np.asarray(2, x.dtype)), x, dtype=x.dtype),
    "log1p": lambda make, eqn, x: make("Log", make("Add", x, known(np.asarray(1, x.dtype)))),
    "expm1": lambda make, eqn, x: make("Sub", make("Exp", x), known(np.asarray(1, x.dtype))),
    "erfc": lambda make, eqn, x: make("Sub", known(np.asarray(1, x.dtype)), make("Erf", x)),
    "rsqrt": lambda make, eqn, x: make("Reciprocal", make("Sqrt", x)),
    "square": lambda make, eqn, x: make("Mul", x, x),
    "integer_pow": _power,
    "clamp": lambda make, eqn, low, x, high: make("Min", make("Max", x, low), high),
    "is_finite": _finite,
    "not": _bitwise("Not"),
    "and": _bitwise("And"),
    "or": _bitwise("Or"),
    "xor": _bitwise("Xor"),
    "eq": _compared("Equal"),
    "ne": _compared("Equal", negated=True),
    "lt": _compared("Less"),
    "le": _compared("LessOrEqual"),
    "gt": _compared("Greater"),
    "ge": _compared("GreaterOrEqual"),
    "select_n": _select,
    "convert_element_type": _cast,
    "reduce_precision": _cast,
}


def apply(graph: Graph, eqn: Any, *values: Value) -> Value:
    """The result of an elementwise primitive, broadcast to the shape of its equation no sooner than it has to be."""

    def make(kind: str, *arguments: Value, dtype: Any = None, **attributes: Any) -> Value:
        least = [argument.least for argument in arguments]
        shape = _together([value.shape for value in least])
        return graph.node(kind, least, shape, arguments[0].dtype if dtype is None else dtype, **attributes)

    found = RULES[eqn.primitive.name](make, eqn, *values)
    shape = tuple(eqn.outvars[0].aval.shape)
    if same(found.shape, shape):
        return found
    axes = range(len(shape) - len(found.shape), len(shape))
    return graph.broadcast(found, shape, axes)


def _together(shapes: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The shape that shapes of the same rank, or of none, are broadcast to."""
    rank = max(map(len, shapes))
    whole = [1] * rank
    for shape in shapes:
        for axis, size in enumerate(shape, rank - len(shape)):
            if not (isinstance(size, int | np.integer) and size == 1):
                whole[axis] = size
    return tuple(whole)
