"""Primitives that bring elements together: matrix products, convolutions, sums, largest ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from models.core.onnx.graph import Graph, Value, known


def _product(graph: Graph, eqn: Any, left: Value, right: Value) -> Value:
    """A matrix product `[*batch, M, K] x [*batch, K, N]`, the free axes of each side as one where there are several."""
    contracted, batch = eqn.params["dimension_numbers"]
    (mine, theirs), (my_batch, their_batch) = ([list(map(int, axes)) for axes in pair] for pair in (contracted, batch))
    free = [axis for axis in range(len(left.shape)) if axis not in (*mine, *my_batch)]
    other = [axis for axis in range(len(right.shape)) if axis not in (*theirs, *their_batch)]
    sizes = [left.shape[axis] for axis in my_batch]
    depth = _sizes(left, mine)
    a = graph.transpose(left, [*my_batch, *free, *mine])
    b = graph.transpose(right, [*their_batch, *theirs, *other])
    rows, columns = [left.shape[axis] for axis in free], [right.shape[axis] for axis in other]
    # MatMul takes more axes on the left than on the right: then nothing has to be reshaped.
    keep = not my_batch and len(free) > 0
    a = graph.reshape(a, [*rows, depth] if keep else [*sizes, _number(rows), depth])
    b = graph.reshape(b, [*sizes, depth, _number(columns)])
    shape = [*(rows if keep else [*sizes, _number(rows)]), _number(columns)]
    found = graph.node("MatMul", [a, b], shape, left.dtype)
    return graph.reshape(found, eqn.outvars[0].aval.shape)


def _sizes(value: Value, axes: Sequence[int]) -> Any:
    return _number([value.shape[axis] for axis in axes])


def _number(sizes: Sequence[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


def _convolution(graph: Graph, eqn: Any, x: Value, kernel: Value) -> Value:
    params = eqn.params
    numbers = params["dimension_numbers"]
    if any(step != 1 for step in params["lhs_dilation"]) or params["batch_group_count"] != 1:
        raise NotImplementedError("a convolution of a dilated map, or of groups of the batch")
    shape = eqn.outvars[0].aval.shape
    first = [shape[axis] for axis in numbers.out_spec]
    pads = [int(axis[side]) for side in (0, 1) for axis in params["padding"]]
    if min(pads) < 0:
        raise NotImplementedError("a convolution with negative padding")
    found = graph.node(
        "Conv",
        [graph.transpose(x, numbers.lhs_spec), graph.transpose(kernel, numbers.rhs_spec)],
        first,
        x.dtype,
        strides=list(map(int, params["window_strides"])),
        dilations=list(map(int, params["rhs_dilation"])),
        pads=pads,
        group=int(params["feature_group_count"]),
    )
    return graph.transpose(found, np.argsort(numbers.out_spec).tolist())


def _reduced(kind: str) -> Callable[..., Value]:
    def rule(graph: Graph, eqn: Any, x: Value) -> Value:
        if not eqn.params["axes"]:  # which ONNX takes for all
            return x
        axes = known(np.asarray(eqn.params["axes"], np.int64))
        return graph.node(kind, [x, axes], eqn.outvars[0].aval.shape, x.dtype, keepdims=0)

    return rule


def _logical(kind: str) -> Callable[..., Value]:
    def rule(graph: Graph, eqn: Any, x: Value) -> Value:
        if x.dtype != bool:
            raise NotImplementedError(f"{eqn.primitive.name} of {x.dtype}")
        whole = graph.node("Cast", [x], x.shape, np.int32, to=6)
        found = _reduced(kind)(graph, eqn, whole)
        return graph.node("Cast", [found], found.shape, bool, to=9)

    return rule


def _arg(kind: str) -> Callable[..., Value]:
    def rule(graph: Graph, eqn: Any, x: Value) -> Value:
        (axis,) = eqn.params["axes"]
        shape, dtype = eqn.outvars[0].aval.shape, np.dtype(eqn.params["index_dtype"])
        found = graph.node(kind, [x], shape, np.int64, axis=int(axis), keepdims=0)
        return graph.node("Cast", [found], shape, dtype, to=graph.onnx.helper.np_dtype_to_tensor_dtype(dtype))

    return rule


def _top_k(graph: Graph, eqn: Any, x: Value) -> list[Value]:
    values, places = (variable.aval for variable in eqn.outvars)
    axis = int(eqn.params.get("axis", len(x.shape) - 1))
    count = known(np.asarray([eqn.params["k"]], np.int64))
    largest, found = graph.nodes_of(
        "TopK", [x, count], [(values.shape, x.dtype), (places.shape, np.int64)], axis=axis, largest=1, sorted=1
    )
    kind = graph.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(places.dtype))
    return [largest, graph.node("Cast", [found], places.shape, places.dtype, to=kind)]


def _largest_of_windows(graph: Graph, eqn: Any, x: Value) -> Value:
    params, shape = eqn.params, eqn.outvars[0].aval.shape
    window, strides, padding = (params[name] for name in ("window_dimensions", "window_strides", "padding"))
    if any(step != 1 for step in params["base_dilation"]):
        raise NotImplementedError("a pool of a dilated map")
    space = [axis for axis, size in enumerate(window) if size != 1]
    order = [axis for axis in range(len(window)) if axis not in space] + space
    if len(order) - len(space) != 2 or any(strides[axis] != 1 for axis in order[:2]):
        raise NotImplementedError(f"a pool over {len(space)} of {len(window)} axes")
    found = graph.node(
        "MaxPool",
        [graph.transpose(x, order)],
        [shape[axis] for axis in order],
        x.dtype,
        kernel_shape=[int(window[axis]) for axis in space],
        strides=[int(strides[axis]) for axis in space],
        dilations=[int(params["window_dilation"][axis]) for axis in space],
        pads=[int(padding[axis][side]) for side in (0, 1) for axis in space],
    )
    return graph.transpose(found, np.argsort(order).tolist())


RULES: dict[str, Callable[..., Any]] = {
    "dot_general": _product,
    "conv_general_dilated": _convolution,
    "reduce_sum": _reduced("ReduceSum"),
    "reduce_max": _reduced("ReduceMax"),
    "reduce_min": _reduced("ReduceMin"),
    "reduce_prod": _reduced("ReduceProd"),
    "reduce_and": _logical("ReduceMin"),
    "reduce_or": _logical("ReduceMax"),
    "argmax": _arg("ArgMax"),
    "argmin": _arg("ArgMin"),
    "top_k": _top_k,
    "reduce_window_max": _largest_of_windows,
}
