"""An ONNX graph that is being made: values, nodes, and what is known already.

A value is an array that is known (weights, indices), the result of a node, or another value that is still to be
broadcast. What follows from known arrays alone is computed at once, by the definition of the operator that the package
`onnx` has (`onnx.reference`), so indices are numbers by the time that a rule looks at them. A value that is broadcast
stays small until somebody needs all of it: ONNX's elementwise operators broadcast by themselves.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

OPSET = 18
MOST_SHARED_BYTES = 64
"""Of constants up to this size there is one of each value."""


@dataclasses.dataclass(eq=False)
class Value:
    """An array of the graph.

    Attributes:
      shape: of integers, and of multiples of the batch where they are no numbers.
      dtype: that of ONNX, where every floating-point type is float32.
      array: its numbers, if they are known.
      small: a value of the same rank that is this one once it is broadcast.
      name: in the graph, once it is there.
    """

    shape: tuple[Any, ...]
    dtype: np.dtype
    array: np.ndarray | None = None
    small: Value | None = None
    name: str = ""

    @property
    def least(self) -> Value:
        """The smallest value that can be broadcast to this one."""
        return self.small or self


def dtype_of(dtype: Any) -> np.dtype:
    """The type that an array of a type has in the graph: float32 for all floats, which every runtime computes in."""
    known = np.dtype(dtype)
    if known.kind == "V" or known.name in ("bfloat16", "float16") or known.name.startswith("float8"):
        return np.dtype(np.float32)
    return known


def known(array: Any) -> Value:
    """A value whose numbers are known."""
    array = np.asarray(array)
    array = array.astype(dtype_of(array.dtype), copy=False)
    return Value(array.shape, array.dtype, array)


class Graph:
    """Nodes and constants in the order of the computation."""

    def __init__(self, symbol: Any):
        import onnx
        from onnx import helper, numpy_helper, reference

        self.onnx, self._helper, self._numpy, self._reference = onnx, helper, numpy_helper, reference
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.inputs: list[Any] = []
        self._shared: dict[Any, Value] = {}
        self._symbol = str(symbol)
        self._sizes: dict[int, Value] = {}
        self._first: Value | None = None

    # --- nodes --------------------------------------------------------------------------------------------------------

    def input(self, name: str, shape: Sequence[Any], dtype: Any) -> Value:
        """An input of the graph."""
        value = Value(tuple(shape), dtype_of(dtype), name=name)
        self.inputs.append(self._described(value))
        self._first = self._first or value
        return value

    def node(
        self, kind: str, inputs: Sequence[Value | None], shape: Sequence[Any], dtype: Any, **attributes: Any
    ) -> Any:
        """The result of an operator, which has the shape and the type that are given."""
        return self.nodes_of(kind, inputs, [(shape, dtype)], **attributes)[0]

    def nodes_of(
        self, kind: str, inputs: Sequence[Value | None], results: Sequence[tuple[Any, Any]], **attributes: Any
    ) -> list[Value]:
        """The results of an operator that has several."""
        values = [Value(tuple(shape), np.dtype(dtype)) for shape, dtype in results]
        if all(value is None or value.array is not None for value in inputs):
            names = [f"x{number}" if value is not None else "" for number, value in enumerate(inputs)]
            node = self._helper.make_node(kind, names, [f"y{number}" for number in range(len(values))], **attributes)
            feeds = {name: value.array for name, value in zip(names, inputs, strict=True) if value is not None}
            found = self._reference.ReferenceEvaluator(node, opsets={"": OPSET}).run(None, feeds)
            return [known(np.asarray(array, value.dtype)) for array, value in zip(found, values, strict=True)]
        names = ["" if value is None else self.named(value) for value in inputs]  # which may add nodes before this one
        for number, value in enumerate(values):
            value.name = f"{kind.lower()}_{len(self.nodes)}" + (f"_{number}" if number else "")
        self.nodes.append(self._helper.make_node(kind, names, [value.name for value in values], **attributes))
        return values

    def named(self, value: Value) -> str:
        """The name of a value, which is in the graph from here on, all of it."""
        if value.name:
            return value.name
        if value.array is not None:
            if value.array.nbytes <= MOST_SHARED_BYTES:
                key = (value.array.dtype.str, value.array.shape, value.array.tobytes())
                shared = self._shared.setdefault(key, value)
                if shared is not value:
                    return self.named(shared)
            value.name = f"constant_{len(self.constants)}"
            whole = np.ascontiguousarray(value.array).reshape(value.shape)  # a number would become a row of one
            self.constants[value.name] = self._numpy.from_array(whole, value.name)
        elif value.small is not None:
            parts = zip(value.shape, value.small.shape, strict=True)
            more = [1 if same([part], [size]) else size for size, part in parts]
            expanded = self.node("Expand", [value.small, self.sizes(more)], value.shape, value.dtype)
            value.name, value.small = self.named(expanded), None
        return value.name

    # --- shapes -------------------------------------------------------------------------------------------------------

    def sizes(self, shape: Sequence[Any]) -> Value:
        """A shape as a value, whatever the batch."""
        if all(isinstance(size, int | np.integer) for size in shape):
            return known(np.asarray(shape, np.int64))
        parts = [known([size]) if isinstance(size, int | np.integer) else self._size(size) for size in shape]
        return self.node("Concat", parts, (len(parts),), np.int64, axis=0)

    def _size(self, size: Any) -> Value:
        times = self.times(size)
        if times not in self._sizes:
            assert self._first is not None
            batch = self.node("Shape", [self._first], (1,), np.int64, start=0, end=1)
            self._sizes[times] = batch if times == 1 else self.node("Mul", [batch, known([times])], (1,), np.int64)
        return self._sizes[times]

    def times(self, size: Any) -> int:
        """How many times the batch a size is.

        Raises:
          NotImplementedError: it is no multiple of the batch.
        """
        found = [_evaluated(str(size), self._symbol, batch) for batch in (2, 3)]
        if found[0] is None or found[1] is None or found[0] * 3 != found[1] * 2 or found[0] % 2:
            raise NotImplementedError(f"a size of {size}, which is no multiple of the batch")
        return found[0] // 2

    def reshape(self, value: Value, shape: Sequence[Any]) -> Value:
        """The value in another shape of as many elements."""
        shape = tuple(shape)
        if same(value.shape, shape):
            return value
        if value.array is not None:
            return known(value.array.reshape(shape))
        unknown = [place for place, size in enumerate(shape) if not isinstance(size, int | np.integer)]
        if len(unknown) <= 1:
            sizes = known(np.asarray([-1 if place in unknown else size for place, size in enumerate(shape)], np.int64))
        else:
            sizes = self.sizes(shape)
        return self.node("Reshape", [value, sizes], shape, value.dtype)

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        """The value with its axes in another order."""
        order = [int(axis) for axis in order]
        if order == sorted(order):
            return value
        if value.array is not None:
            return known(value.array.transpose(order))
        return self.node("Transpose", [value], [value.shape[axis] for axis in order], value.dtype, perm=order)

    def broadcast(self, value: Value, shape: Sequence[Any], axes: Sequence[int]) -> Value:
        """The value with its axes at `axes` of a shape, and the same at every place of the other axes."""
        shape = tuple(shape)
        least, ones = value.least, [1] * len(shape)
        for axis, size in zip(axes, least.shape, strict=True):
            ones[axis] = size
        small = self.reshape(least, ones)
        if same(small.shape, shape):
            return small
        array = small.array
        if array is not None and all(isinstance(size, int | np.integer) for size in shape):
            return Value(shape, value.dtype, np.broadcast_to(array, shape), small)
        return Value(shape, value.dtype, None, small)

    # --- the whole ----------------------------------------------------------------------------------------------------

    def model(self, outputs: dict[str, Value]) -> Any:
        """The graph as an ONNX model of these outputs, without what none of them needs."""
        described = []
        for name, value in outputs.items():
            self.nodes.append(self._helper.make_node("Identity", [self.named(value)], [name]))
            described.append(self._described(dataclasses.replace(value, name=name)))
        needed, kept = {output.name for output in described}, []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(node.input)
        constants = [constant for name, constant in self.constants.items() if name in needed]
        graph = self._helper.make_graph(kept[::-1], "inference", self.inputs, described, constants)
        opsets = [self._helper.make_opsetid("", OPSET)]
        return self._helper.make_model(graph, producer_name="fovea", opset_imports=opsets, ir_version=8)

    def _described(self, value: Value) -> Any:
        kind = self._helper.np_dtype_to_tensor_dtype(value.dtype)
        sizes = [int(size) if isinstance(size, int | np.integer) else str(size) for size in value.shape]
        return self._helper.make_tensor_value_info(value.name, kind, sizes)


def same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two shapes are equal, whatever the batch."""
    return len(one) == len(other) and all(a is b or a == b for a, b in zip(one, other, strict=True))


def _evaluated(text: str, symbol: str, batch: int) -> int | None:
    """The number that JAX's text of a size, such as `4*batch`, is for a batch; None if it is not so simple."""
    factors = text.split("*")
    if any(factor != symbol and not factor.isdigit() for factor in factors):
        return None
    return math.prod(batch if factor == symbol else int(factor) for factor in factors)
