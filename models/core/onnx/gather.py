"""JAX's gather, which takes windows of some axes at places that an array names, by ONNX's Gather and GatherND."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from models.core.onnx.graph import Graph, Value, known, same


def gather(graph: Graph, eqn: Any, operand: Value, indices: Value) -> Value:
    """The axes that are indexed become one, and the places one number each; axes are followed by their labels:
    `("x", axis)` of the operand, `("w", axis)` of the window along an indexed one, `("i", axis)` of the indices.
    """
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    batching = [int(axis) for axis in numbers.operand_batching_dims]
    collapsed = [int(axis) for axis in numbers.collapsed_slice_dims]
    places, outside = _places(graph, eqn, operand, indices)
    indexed = sorted(places)
    rest = [axis for axis in range(len(operand.shape)) if axis not in batching and axis not in indexed]
    for axis in rest:
        if not same([sizes[axis]], [operand.shape[axis]]):
            raise NotImplementedError("a gather of part of an axis that no index says")

    windows = [axis for axis in indexed if axis not in collapsed]
    place, labels = _linear(graph, operand, places, windows, sizes, indices)
    if batching:
        front = [*batching, *indexed, *rest]
        whole = int(np.prod([operand.shape[axis] for axis in indexed]))
        data = graph.transpose(operand, front)
        data = graph.reshape(data, [*data.shape[: len(batching)], whole, *(operand.shape[axis] for axis in rest)])
        own = [("i", int(axis)) for axis in numbers.start_indices_batching_dims]
        order = [labels.index(label) for label in own]
        order += [axis for axis in range(len(labels)) if axis not in order]
        labels = [labels[axis] for axis in order]
        place = graph.transpose(place, order)
        place = graph.node("Cast", [place], place.shape, np.int64, to=7) if place.dtype != np.int64 else place
        place = graph.reshape(place, [*place.shape, 1])
        shape = [*place.shape[:-1], *(operand.shape[axis] for axis in rest)]
        found = graph.node("GatherND", [data, place], shape, operand.dtype, batch_dims=len(batching))
        labels = [*labels, *(("x", axis) for axis in rest)]
    elif indexed:
        first = indexed[0]
        before = [axis for axis in rest if axis < first]
        after = [axis for axis in rest if axis > first]
        data = graph.transpose(operand, [*before, *indexed, *after])
        whole = int(np.prod([operand.shape[axis] for axis in indexed]))
        data = graph.reshape(data, [*(operand.shape[a] for a in before), whole, *(operand.shape[a] for a in after)])
        shape = [*(operand.shape[a] for a in before), *place.shape, *(operand.shape[a] for a in after)]
        found = graph.node("Gather", [data, place], shape, operand.dtype, axis=len(before))
        labels = [*(("x", axis) for axis in before), *labels, *(("x", axis) for axis in after)]
    else:  # everything is taken whole
        if any(not (isinstance(size, int | np.integer) and size == 1) for size in indices.shape[:-1]):
            raise NotImplementedError("a gather that repeats the whole operand")
        found, labels = operand, [("x", axis) for axis in rest]

    # Axes that are dropped or that only the result has are of size 1; the others are brought into its order.
    wanted = _labels(eqn, [*batching, *collapsed], windows)
    kept = [label for label in wanted if label in labels]
    ones = [label for label in labels if label not in wanted]
    found = graph.transpose(found, [labels.index(label) for label in (*kept, *ones)])
    found = graph.reshape(found, eqn.outvars[0].aval.shape)
    fill = eqn.params.get("fill_value")
    for mask in outside:
        axes = [wanted.index(("i", axis)) for axis in range(len(mask.shape))]
        spread = graph.broadcast(mask, found.shape, axes).least
        value = known(np.asarray(np.nan if fill is None else fill, found.dtype))
        found = graph.node("Where", [spread, value, found], found.shape, found.dtype)
    return found


def _places(graph: Graph, eqn: Any, operand: Value, indices: Value) -> tuple[dict[int, Value], list[Value]]:
    """Where windows begin along each axis that has a choice, `[*indices]`, all of them inside; and which of them were
    not, if that means another value.
    """
    numbers, sizes, mode = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], eqn.params["mode"]
    batch = list(indices.shape[:-1])
    found: dict[int, Value] = {}
    outside: list[Value] = []
    for column, axis in enumerate(map(int, numbers.start_index_map)):
        if axis not in numbers.collapsed_slice_dims and same([sizes[axis]], [operand.shape[axis]]):
            continue  # a window as large as the axis begins at its start
        most = operand.shape[axis] - sizes[axis]
        if indices.array is not None:
            wanted = indices.array[..., column]
            place = known(np.clip(wanted, 0, most))
            if mode is not jax.lax.GatherScatterMode.CLIP and (wanted != place.array).any():
                raise NotImplementedError("a gather of places outside")
        else:
            place = graph.node("Gather", [indices, known(np.int64(column))], batch, indices.dtype, axis=len(batch))
            if mode is not jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS:
                bounds = [known(np.asarray(value, indices.dtype)) for value in (0, most)]
                inside = graph.node("Clip", [place, *bounds], batch, indices.dtype)
                if mode is jax.lax.GatherScatterMode.FILL_OR_DROP:
                    equal = graph.node("Equal", [place, inside], batch, bool)
                    outside.append(graph.node("Not", [equal], batch, bool))
                place = inside
        found[axis] = place
    return found, outside


def _linear(
    graph: Graph, operand: Value, places: dict[int, Value], windows: list[int], sizes: Any, indices: Value
) -> tuple[Value, list[Any]]:
    """One number for each place among all those of the indexed axes, and the labels of its axes."""
    batch = list(indices.shape[:-1])
    labels = [("i", axis) for axis in range(len(batch))] + [("w", axis) for axis in windows]
    total: Value | None = None
    stride = 1
    for axis in sorted(places, reverse=True):
        place = graph.reshape(places[axis], [*batch, *([1] * len(windows))])
        if axis in windows:
            steps = [1] * len(windows)
            steps[windows.index(axis)] = sizes[axis]
            offsets = known(np.arange(sizes[axis], dtype=place.dtype).reshape([1] * len(batch) + steps))
            place = _sum(graph, place, offsets)
        if stride != 1:
            place = graph.node("Mul", [place, known(np.asarray(stride, place.dtype))], place.shape, place.dtype)
        total = place if total is None else _sum(graph, total, place)
        stride *= operand.shape[axis]
    return (known(np.int64(0)) if total is None else total), labels


def _sum(graph: Graph, one: Value, other: Value) -> Value:
    shape = [b if isinstance(a, int) and a == 1 else a for a, b in zip(one.shape, other.shape, strict=True)]
    return graph.node("Add", [one, other], shape, one.dtype)


def _labels(eqn: Any, dropped: list[int], windows: list[int]) -> list[Any]:
    """Of each axis of the result.

    Args:
      dropped: axes of the operand that are none of the result.
    """
    offsets = [int(axis) for axis in eqn.params["dimension_numbers"].offset_dims]
    taken = iter([axis for axis in range(len(eqn.invars[0].aval.shape)) if axis not in dropped])
    own = iter(range(len(eqn.invars[1].aval.shape) - 1))
    result = []
    for axis in range(len(eqn.outvars[0].aval.shape)):
        if axis in offsets:
            of = next(taken)
            result.append(("w", of) if of in windows else ("x", of))
        else:
            result.append(("i", next(own)))
    return result


RULES = {"gather": gather}
