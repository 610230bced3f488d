"""What a model costs, by block, before any device is touched: parameters, multiply-adds, activation bytes.

All numbers come from tracing the model itself, so every model has them and none states them by hand. Rows are the first
components of parameter names (`patch_embed`, `blocks.3`, `stages.2.blocks.5`, `head`); a model names its computation
alike with `jax.named_scope`. A scanned stack counts each of its layers, and equals its unrolled twin.

XLA's own cost analysis is no use here: it counts the body of a scan once.
"""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from attn.core.lowering import STEP, expanded
from attn.core.tables import html_table
from models.core import times as products
from models.core.state import merge, split, unrolled_names

_LAYER = re.compile(r"^((?:[^.]+\.(?:\d+|\[\d+::\d+\])\.)*[^.]+\.(?:\d+|\[\d+::\d+\]))(?:\.|$)")


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one row, for the whole batch.

    `multiply_adds` counts matrix products and convolutions in the forward pass, one for each multiplication with its
    addition (what papers on vision models call FLOPs). `activation_bytes` is what the forward pass of a training step
    keeps for the backward pass: what JAX itself decides, after dtype and rematerialization. Parameters are not counted,
    copies of them in another dtype are.
    """

    parameters: int = 0
    multiply_adds: int = 0
    activation_bytes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclasses.dataclass(frozen=True)
class Summary:
    """Costs by row, in the order of the computation; `str()` is a table."""

    rows: Mapping[str, Cost]
    batch: int

    @property
    def total(self) -> Cost:
        """Sum of all rows."""
        return sum(self.rows.values(), Cost())

    def __str__(self) -> str:
        lines = [("", *_COSTS), *self._lines()]
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        text = [
            "  ".join([name.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells, widths[1:], strict=True))])
            for name, *cells in lines
        ]
        rule = "-" * len(text[0])
        return "\n".join([text[0], rule, *text[1:-1], rule, text[-1], self._note()])

    def _repr_html_(self) -> str:
        """For notebooks."""
        return html_table("Costs", ("", *_COSTS), self._lines(), numbers=(1, 2, 3), note=self._note())

    def _lines(self) -> list[tuple[str, str, str, str]]:
        return [(name, *_cells(cost)) for name, cost in folded(self.rows)] + [("total", *_cells(self.total))]

    def _note(self) -> str:
        return f"forward multiply-adds and bytes kept for backward, batch of {self.batch}; '(each)' rows are per layer"


_COSTS = ("parameters", "multiply-adds", "activations")


def summarize(
    model: nnx.Module,
    inputs: Any,
    *,
    call: Callable[[nnx.Module, Any], Any] | None = None,
    activations: bool = True,
) -> Summary:
    """Costs of a forward pass.

    The model may be abstract (made under `nnx.eval_shape`). The multiply-adds of an operator are those of its
    definition (`attn.core.operator.Operator`), which multiplies what is needed and nothing else, whichever
    implementation runs.

    Args:
      inputs: a batch size, for what the model is made for (`model.inputs(batch)`); or the shape of images
        `(B, Y, X, I)`; or, for `call`, shapes and dtypes in any structure (`jax.ShapeDtypeStruct`).
      call: how the model is called with the inputs; `model(*inputs)` unless given.
      activations: without them their bytes are 0, and the model is traced once, in less than half of the time.
    """
    graph, params, state = split(model)
    abstract, abstract_state = (
        {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in flat.items()}
        for flat in (params, state)
    )
    if call is not None:
        given = inputs
    elif isinstance(inputs, int):
        given = model.inputs(inputs)  # type: ignore[attr-defined]
    else:
        given = (jax.ShapeDtypeStruct(tuple(inputs), jnp.float32),)

    def forward(params, state, given):
        made = merge(graph, params, state)
        return made(*given) if call is None else call(made, given)

    def kept_for_backward(params, state, given):
        return jax.tree.leaves(jax.vjp(lambda params: forward(params, state, given), params)[1])

    costs = _parameters(params)
    jaxpr = jax.make_jaxpr(forward)(abstract, abstract_state, given).jaxpr
    for scope, count in _multiply_adds(jaxpr):
        costs[_row(scope)] += Cost(multiply_adds=count)
    if activations:
        for scope, size in _residuals(jax.make_jaxpr(kept_for_backward)(abstract, abstract_state, given).jaxpr):
            costs[_row(scope)] += Cost(activation_bytes=size)

    rows = _by_layer(costs, params)
    batch = jax.tree.leaves(given)[0].shape[0]
    return Summary({name: rows[name] for name in sorted(rows, key=_order(jaxpr))}, batch)


def parameter_rows(params: Mapping[str, Any]) -> dict[str, Cost]:
    """Parameters alone, by row, in the order of their names; nothing is traced."""
    return _by_layer(_parameters(params), params)


def _parameters(params: Mapping[str, Any]) -> dict[str, Cost]:
    costs: dict[str, Cost] = defaultdict(Cost)
    for name, value in params.items():
        costs[_row(name)] += Cost(parameters=math.prod(value.shape))
    return costs


def _by_layer(costs: Mapping[str, Cost], params: Mapping[str, Any]) -> dict[str, Cost]:
    """Costs of scanned rows as those of each layer: how many these are, the leading axis of the parameters says."""
    layers = {_row(name): value.shape[0] for name, value in params.items() if "[" in name}
    rows: dict[str, Cost] = {}
    for name, cost in costs.items():
        count = layers.get(name, 1)
        each = Cost(*(value // count for value in dataclasses.astuple(cost)))
        rows |= dict.fromkeys(unrolled_names(name, count), each)
    return rows


def _row(name: str) -> str:
    """Row of a parameter name or of a scope: its names with an index, `stages.2.blocks.5`, else the first component."""
    match = _LAYER.match(name)
    return match[1] if match else name.partition(".")[0] or "(other)"


def _order(jaxpr: core.Jaxpr) -> Callable[[str], tuple[int, int]]:
    """Sort key of rows: as first met in the computation (rows without any of their own first), layers by number."""
    met = list(dict.fromkeys(_row(scope) for scope in _scopes(jaxpr)))
    rank = {row: place for place, row in enumerate(met)}
    # Layers of a scanned stack were not met by their names, but by that of the stack.
    stacks = {_stem(row): place for place, row in reversed(list(enumerate(met)))}

    def key(name: str) -> tuple[int, int]:
        number = name.rpartition(".")[2]
        return rank.get(name, stacks.get(_stem(name), -1)), int(number) if number.isdigit() else 0

    return key


def _stem(row: str) -> str:
    return row.rpartition(".")[0] or row


# --- walking jaxprs ---------------------------------------------------------------------------------------------------

REMATERIALIZED = "rematted_computation"  # what JAX calls it in the names of equations


def multiply_adds(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> int:
    """Multiply-adds of everything in a jaxpr, such as that of a training step, but for what is computed again."""
    opened = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    return sum(count for _, count in _multiply_adds(opened, again=False))


OF_PRIMITIVE: dict[core.Primitive, Callable[[core.JaxprEqn], int]] = dict.fromkeys(
    products.EQUATIONS, products.multiply_adds
)
"""Primitive that a layer made for itself -> multiply-adds of an equation of it."""


def _multiply_adds(jaxpr: core.Jaxpr, scope: str = "", times: int = 1, again: bool = True) -> Iterator[tuple[str, int]]:
    """(scope, multiply-adds) of every product in a jaxpr, bodies of loops times their trip count; `again`: with what
    rematerialization computes a second time.
    """
    for eqn in jaxpr.eqns:
        if not again and REMATERIALIZED in str(eqn.source_info.name_stack):
            continue
        inside = scope or _scope(eqn)
        if eqn.primitive.name == "dot_general":
            ((contracted, _), _) = eqn.params["dimension_numbers"]
            depth = math.prod(_shape(eqn.invars[0])[axis] for axis in contracted)
            yield inside, times * depth * math.prod(_shape(eqn.outvars[0]))
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = _shape(eqn.invars[1])
            features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
            yield inside, times * math.prod(kernel) // features * math.prod(_shape(eqn.outvars[0]))
        elif eqn.primitive.name == "cond":
            # One branch runs; the dearest stands for it.
            branches = [list(_multiply_adds(branch, inside, times, again)) for branch in _subjaxprs(eqn)]
            yield from max(branches, key=lambda branch: sum(count for _, count in branch))
        elif eqn.primitive in OF_PRIMITIVE:
            yield inside, times * OF_PRIMITIVE[eqn.primitive](eqn)
        elif eqn.primitive is STEP:
            arrays = [variable.aval for variable in eqn.invars]
            inner = jax.make_jaxpr(functools.partial(expanded, eqn.params))(*arrays).jaxpr
            yield from _multiply_adds(inner, inside or "(other)", times, again)
        else:
            trips = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            if eqn.primitive.name == "shard_map":  # its body is that of one shard
                trips = math.prod(eqn.params["mesh"].shape[axis] for axis in eqn.params["manual_axes"])
            for inner in _subjaxprs(eqn):
                yield from _multiply_adds(inner, inside, times * trips, again)


def _residuals(jaxpr: core.Jaxpr) -> Iterator[tuple[str, int]]:
    """(scope, bytes) of every array a jaxpr returns that it has computed, each once."""
    seen: set[int] = set()
    for variable in jaxpr.outvars:
        scope = _producer(jaxpr, variable, "")
        if scope is None or id(variable) in seen:
            continue
        seen.add(id(variable))
        yield scope, math.prod(_shape(variable)) * variable.aval.dtype.itemsize  # type: ignore[attr-defined]


def _producer(jaxpr: core.Jaxpr, variable: Any, scope: str) -> str | None:
    """Scope of the equation that computes a variable; None for an input or a constant."""
    for eqn in jaxpr.eqns:
        for index, output in enumerate(eqn.outvars):
            if output is not variable:
                continue
            inside = scope or _scope(eqn)
            inner = [sub for sub in _subjaxprs(eqn) if len(sub.outvars) == len(eqn.outvars)]
            if inside or not inner:
                return inside
            # What a loop hands through (the input of each layer under rematerialization) belongs to the loop's body.
            return _producer(inner[0], inner[0].outvars[index], "") or next(_scopes(inner[0]), "")
    return None


def _scopes(jaxpr: core.Jaxpr) -> Iterator[str]:
    """Scopes of all equations, bodies of loops included, in order."""
    for eqn in jaxpr.eqns:
        if scope := _scope(eqn):
            yield scope
        else:
            for inner in _subjaxprs(eqn):
                yield from _scopes(inner)


def _scope(eqn: core.JaxprEqn) -> str:
    """Outermost named scope of an equation, without the transformations around it: `jvp(head)/x` is `head`."""
    names = re.findall(r"[^()/]+(?=\)|/|$)", str(eqn.source_info.name_stack))
    return names[0] if names else ""


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _subjaxprs(eqn: core.JaxprEqn) -> list[core.Jaxpr]:
    values = [v for value in eqn.params.values() for v in (value if isinstance(value, tuple | list) else (value,))]
    jaxprs = [value.jaxpr if isinstance(value, core.ClosedJaxpr) else value for value in values]
    return [jaxpr for jaxpr in jaxprs if isinstance(jaxpr, core.Jaxpr)]


# --- the table --------------------------------------------------------------------------------------------------------


def folded(rows: Mapping[str, Cost]) -> Iterator[tuple[str, Cost]]:
    """Runs of layers with equal costs as one row, `blocks.[0:12] (each)`."""
    run: list[str] = []
    for name in [*rows, None]:
        if run and (name is None or _previous(name) != run[-1] or rows[name] != rows[run[-1]]):
            stem, first = run[0].rpartition(".")[::2]
            label = run[0] if len(run) == 1 else f"{stem}.[{first}:{int(first) + len(run)}] (each)"
            yield label, rows[run[0]]
            run = []
        if name is not None:
            run.append(name)


def _previous(name: str) -> str | None:
    stem, number = name.rpartition(".")[::2]
    return f"{stem}.{int(number) - 1}" if stem and number.isdigit() else None


def _cells(cost: Cost) -> tuple[str, str, str]:
    return f"{cost.parameters:,}", _short(cost.multiply_adds), _short(cost.activation_bytes) + "B"


def _short(value: int) -> str:
    for factor, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= factor:
            return f"{value / factor:.2f} {unit}"
    return f"{value} "
