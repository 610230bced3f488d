"""Primitives that move elements: shapes, slices, padding, pieces, positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from models.core.onnx.graph import Graph, Value, known, same


def _shape(eqn: Any) -> tuple[Any, ...]:
    return tuple(eqn.outvars[0].aval.shape)


def _reshape(graph: Graph, eqn: Any, x: Value) -> Value:
    if eqn.params.get("dimensions") is not None:
        raise NotImplementedError("a reshape in another order")
    return graph.reshape(x, _shape(eqn))


def _transpose(graph: Graph, eqn: Any, x: Value) -> Value:
    return graph.transpose(x, eqn.params["permutation"])


def _broadcast(graph: Graph, eqn: Any, x: Value, *sizes: Value) -> Value:
    return graph.broadcast(x, _shape(eqn), eqn.params["broadcast_dimensions"])


def sliced(
    graph: Graph, x: Value, starts: Sequence[Any], ends: Sequence[Any], strides: Sequence[int] | None = None
) -> Value:
    """Part of a value; what is taken whole may have an unknown size."""
    strides = strides or [1] * len(x.shape)
    cut = [
        axis
        for axis, (start, end, stride, size) in enumerate(zip(starts, ends, strides, x.shape, strict=True))
        if not (stride == 1 and same([start, end], [0, size]))
    ]
    if not cut:
        return x
    if not all(isinstance(number, int | np.integer) for axis in cut for number in (starts[axis], ends[axis])):
        raise NotImplementedError("a part of a batch")
    shape = list(x.shape)
    for axis in cut:
        shape[axis] = max(0, -(-(ends[axis] - starts[axis]) // strides[axis]))
    if x.array is not None:
        return known(x.array[tuple(map(slice, starts, ends, strides))])
    bounds = [known(np.asarray([of[axis] for axis in cut], np.int64)) for of in (starts, ends)]
    others = [known(np.asarray(numbers, np.int64)) for numbers in (cut, [strides[axis] for axis in cut])]
    return graph.node("Slice", [x, *bounds, *others], shape, x.dtype)


def _slice(graph: Graph, eqn: Any, x: Value) -> Value:
    return sliced(graph, x, *(eqn.params[name] for name in ("start_indices", "limit_indices", "strides")))


def _split(graph: Graph, eqn: Any, x: Value) -> list[Value]:
    axis, begin, pieces = eqn.params["axis"], 0, []
    for size in eqn.params["sizes"]:
        starts, ends = [0] * len(x.shape), list(x.shape)
        starts[axis], ends[axis] = begin, begin + size
        pieces.append(sliced(graph, x, starts, ends))
        begin += size
    return pieces


def _concatenate(graph: Graph, eqn: Any, *parts: Value) -> Value:
    return concatenated(graph, parts, int(eqn.params["dimension"]), _shape(eqn))


def concatenated(graph: Graph, parts: Sequence[Value], axis: int, shape: Sequence[Any]) -> Value:
    """Values one after another along an axis."""
    return graph.node("Concat", parts, shape, parts[0].dtype, axis=axis) if len(parts) > 1 else parts[0]


def _stack(graph: Graph, eqn: Any, *parts: Value) -> Value:
    return stacked(graph, parts, int(eqn.params["axis"]))


def stacked(graph: Graph, parts: Sequence[Value], axis: int) -> Value:
    """Values of one shape along a new axis."""
    shape = [*parts[0].shape[:axis], 1, *parts[0].shape[axis:]]
    rows = [graph.reshape(part, shape) for part in parts]
    shape[axis] = len(parts)
    return concatenated(graph, rows, axis, shape)


def _pad(graph: Graph, eqn: Any, x: Value, value: Value) -> Value:
    config = [tuple(map(int, axis)) for axis in eqn.params["padding_config"]]
    if any(between for _, _, between in config):
        raise NotImplementedError("padding between elements")
    cut = [max(0, -before) for before, _, _ in config], [max(0, -after) for _, after, _ in config]
    ends = [size if not after else size - after for size, after in zip(x.shape, cut[1], strict=True)]
    x = sliced(graph, x, cut[0], ends)
    pads = [max(0, axis[side]) for side in (0, 1) for axis in config]
    if not any(pads):
        return x
    return graph.node("Pad", [x, known(np.asarray(pads, np.int64)), value], _shape(eqn), x.dtype)


def _iota(graph: Graph, eqn: Any, *sizes: Value) -> Value:
    shape, axis = _shape(eqn), eqn.params["dimension"]
    size, dtype = shape[axis], np.dtype(eqn.params["dtype"])
    if isinstance(size, int | np.integer):
        return graph.broadcast(known(np.arange(size, dtype=dtype)), shape, [axis])
    count = graph.reshape(graph.sizes([size]), ())
    numbers = graph.node("Range", [known(np.int64(0)), count, known(np.int64(1))], (size,), np.int64)
    kind = graph.onnx.helper.np_dtype_to_tensor_dtype(dtype)
    return graph.broadcast(graph.node("Cast", [numbers], (size,), dtype, to=kind), shape, [axis])


def _reversed(graph: Graph, eqn: Any, x: Value) -> Value:
    for axis in map(int, eqn.params["dimensions"]):
        order = known(np.arange(x.shape[axis])[::-1].astype(np.int64))
        x = graph.node("Gather", [x, order], x.shape, x.dtype, axis=axis)
    return x


def same_value(graph: Graph, eqn: Any, *values: Value) -> list[Value]:
    """What changes nothing."""
    return list(values)


RULES: dict[str, Callable[..., Any]] = {
    "reshape": _reshape,
    "squeeze": lambda graph, eqn, x: graph.reshape(x, _shape(eqn)),
    "expand_dims": lambda graph, eqn, x: graph.reshape(x, _shape(eqn)),
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "split": _split,
    "concatenate": _concatenate,
    "stack": _stack,
    "pad": _pad,
    "iota": _iota,
    "rev": _reversed,
    **dict.fromkeys(
        ("name", "stop_gradient", "copy", "copy_p", "optimization_barrier", "forward_mode_guard", "stop_lowering"),
        same_value,
    ),
}
