"""A model's inference function in ONNX, for onnxruntime and other runtimes that know no JAX.

The function's jaxpr is walked, and every primitive has a rule; loops over layers are unrolled. The batch stays open.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import tree_util
from jax.extend import core

from attn.core.lowering import STEP, expanded
from models.core.export import BATCH, Inputs, inference
from models.core.onnx import contract, elementwise, gather, layout
from models.core.onnx.graph import Graph, Value, known

DEFINITIONS: dict[core.Primitive, Callable[..., Any]] = {}
"""Primitive that a layer made for itself -> the same function in JAX's own, `(*arrays, **parameters)`."""

_RULES: dict[str, Callable[..., Any]] = {**layout.RULES, **gather.RULES, **contract.RULES}
_RULES |= dict.fromkeys(elementwise.RULES, elementwise.apply)
_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")
"""Parameters that hold the body of an equation which is only a call."""


def check_installed(what: str) -> None:
    """ValueError that says how to install what `what` needs, if it is not."""
    if missing := [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]:
        raise ValueError(f"{what}: needs the package {missing[0]} (pip install onnx onnxruntime)")


def export_onnx(model: nnx.Module, inputs: Inputs, *, call: Callable[[nnx.Module, Any], Any] | None = None) -> bytes:
    """`logits = model(images)` as the content of an ONNX file, for any number of images; or `answers = call(model,
    inputs)` for any number of examples.

    The weights are constants of the graph. It computes in float32 whatever the model does. An input of the graph has
    the name of its array, or `input`; an output that of its entry where there are several, or `output`.

    Args:
      model, inputs, call: see `models.core.export.export_inference`.

    Raises:
      ValueError: as there; something in the model has no form in ONNX; or a package is not installed.
    """
    check_installed("an ONNX file")
    import onnx

    answers, given = inference(model, inputs, call)
    try:
        closed, shapes = jax.make_jaxpr(answers, return_shape=True)(given)
        graph = Graph(BATCH)
        arrays = [graph.input(name, spec.shape, spec.dtype) for name, spec in _names(given, "input").items()]
        found = _walk(graph, closed.jaxpr, closed.consts, arrays)
        made = graph.model(dict(zip(_names(shapes, "output"), found, strict=True)))
    except (jax.errors.InconclusiveDimensionOperation, NotImplementedError) as error:
        raise ValueError(f"the model has no form in ONNX for any batch: {str(error).splitlines()[0]}") from error
    onnx.checker.check_model(made)
    return made.SerializeToString()


def _names(tree: Any, alone: str) -> dict[str, Any]:
    """The leaves of a structure by their path in it."""
    leaves = tree_util.tree_leaves_with_path(tree)
    return {tree_util.keystr(path, simple=True, separator=".") or alone: leaf for path, leaf in leaves}


def _walk(graph: Graph, jaxpr: core.Jaxpr, constants: Sequence[Any], arguments: Sequence[Value]) -> list[Value]:
    """The results of a jaxpr."""
    values: dict[Any, Any] = dict(zip(jaxpr.invars, arguments, strict=True))
    values |= dict(zip(jaxpr.constvars, constants, strict=True))

    def read(variable: Any) -> Value:
        if isinstance(variable, core.Literal):
            aval: Any = variable.aval
            return known(np.asarray(variable.val, aval.dtype))
        found = values[variable]
        if not isinstance(found, Value):  # a weight, which is only looked at where something needs it
            found = values[variable] = known(found)
        return found

    for eqn in _needed(jaxpr):
        results = _results(graph, eqn, [read(variable) for variable in eqn.invars])
        for variable, value in zip(eqn.outvars, results, strict=True):
            values[variable] = value
    return [read(variable) for variable in jaxpr.outvars]


def _needed(jaxpr: core.Jaxpr) -> list[Any]:
    """The equations that the results depend on: keys that nobody draws from are no part of the function."""
    wanted, kept = {variable for variable in jaxpr.outvars if not isinstance(variable, core.Literal)}, []
    for eqn in reversed(jaxpr.eqns):
        if wanted.intersection(eqn.outvars):
            kept.append(eqn)
            wanted.update(variable for variable in eqn.invars if not isinstance(variable, core.Literal))
    return kept[::-1]


def _results(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
    name = eqn.primitive.name
    if name == "scan":
        return _unrolled(graph, eqn, values)
    if eqn.primitive is STEP:
        return _defined(graph, functools.partial(expanded, eqn.params), eqn, values)
    if eqn.primitive in DEFINITIONS:
        return _defined(graph, functools.partial(DEFINITIONS[eqn.primitive], **eqn.params), eqn, values)
    if name in _RULES:
        found = _RULES[name](graph, eqn, *values)
        return found if isinstance(found, list) else [found]
    body = next((eqn.params[key] for key in _CALLS if key in eqn.params), None)
    if body is None or name in ("while", "cond"):
        raise NotImplementedError(f"there is no rule for JAX's {name}")
    return _walk(graph, *_opened(body), values)


def _opened(body: core.Jaxpr | core.ClosedJaxpr) -> tuple[core.Jaxpr, Sequence[Any]]:
    """A jaxpr and its constants, which JAX 0.12 keeps in one object."""
    return (body.jaxpr, body.consts) if isinstance(body, core.ClosedJaxpr) else (body, ())


def _defined(graph: Graph, function: Callable[..., Any], eqn: Any, values: list[Value]) -> list[Value]:
    """A primitive of this house, by what it computes."""
    shapes = [jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype) for variable in eqn.invars]
    closed = jax.make_jaxpr(function)(*shapes)
    return _walk(graph, closed.jaxpr, closed.consts, values)


def _unrolled(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
    """The steps of a scan one after another: each layer with its own weights, which are known."""
    params, (body, constants) = eqn.params, _opened(eqn.params["jaxpr"])
    # What a scan goes along has an axis more than its body sees, and so have the results that it stacks.
    stacked = [_rank(out) > _rank(own) for out, own in zip(eqn.outvars, body.outvars, strict=True)]
    rows = sum(_rank(given) > _rank(own) for given, own in zip(eqn.invars, body.invars, strict=True))
    carried, first = stacked.count(False), len(values) - rows
    kept, state, along = values[: first - carried], values[first - carried : first], values[first:]
    results = []
    places = range(params["length"])
    for place in reversed(places) if params["reverse"] else places:
        inputs = [*kept, *state, *(_row(graph, value, place) for value in along)]
        found = _walk(graph, body, constants, inputs)
        state = found[:carried]
        results.append(found[carried:])
    if params["reverse"]:
        results.reverse()
    return [*state, *(layout.stacked(graph, column, 0) for column in zip(*results, strict=True))]


def _rank(variable: Any) -> int:
    return len(variable.aval.shape)


def _row(graph: Graph, value: Value, place: int) -> Value:
    if value.array is not None:
        return known(value.array[place])
    part = layout.sliced(graph, value, [place, *[0] * (len(value.shape) - 1)], [place + 1, *value.shape[1:]])
    return graph.reshape(part, value.shape[1:])


def difference(content: bytes, given: Mapping[str, np.ndarray], expected: Any) -> float:
    """How far onnxruntime's outputs of an exported function are from others, as a fraction of the largest of these.

    Args:
      content: of the file.
      given: inputs by name.
      expected: the outputs, in the structure that the function returns.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    wanted = {name: np.asarray(array, np.float64) for name, array in _names(expected, "output").items()}
    found = session.run(list(wanted), dict(given))
    parts = zip(found, wanted.values(), strict=True)
    return max(float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-30)) for a, b in parts)
