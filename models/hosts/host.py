"""What every model has in common: how it runs outside of a compiled program, and is looked into."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from attn.core.shards import check_mesh
from attn.core.tables import html_table
from models.core.state import Graph, merge, split
from models.core.summary import folded, parameter_rows
from models.core.tap import parts
from models.core.watch import Watch


class Host(nnx.Module):
    """A model. What it computes is a method, which its `__call__` runs through `called`."""

    @property
    def depth(self) -> int:
        """Layers of the model; what is behind them has this number for taps."""
        raise NotImplementedError

    def inputs(self, batch: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of what the model is called with."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        """For notebooks: parameters by part, and the options that are not the usual ones."""
        rows = parameter_rows(split(self)[1])
        # By the order of the computation, where the model knows it; parameters are sorted by name.
        order = getattr(self, "layer_id", lambda name: 0)
        ordered = {name: rows[name] for name in sorted(rows, key=lambda name: (order(f"{name}."), _natural(name)))}
        lines = [(name, f"{cost.parameters:,}") for name, cost in folded(ordered)]
        total = f"{sum(cost.parameters for cost in rows.values()):,}"
        note = "models.summarize(model, 1) adds multiply-adds and activations; '(each)' rows are per layer"
        table = html_table(type(self).__name__, ("", "parameters"), [*lines, ("total", total)], numbers=(1,), note=note)
        options = getattr(self, "options", None)
        if not dataclasses.is_dataclass(options):
            return table
        given = [
            (field.name, repr(getattr(options, field.name)))
            for field in dataclasses.fields(options)
            if getattr(options, field.name) != field.default
        ]
        return table + html_table("Options", ("option", "value"), given)

    def called(self, method: str, arguments: tuple[Any, ...], tap: Any, **static: Any) -> Any:
        """`self.<method>(*arguments, watch, **static)`, as part of the program around it, or compiled where there is
        none: once for a model and shapes.

        Args:
          arguments: pytrees of arrays.
          tap: what looks in; the method is given a `Watch` of it, or None.
          static: hashable; `train` is among them, and lets state (batch statistics) change.

        Raises:
          ValueError: a mesh of a kind that is not served; a tap that meets no site; a model without weights.
        """
        check_mesh(f"a model ({type(self).__name__})")
        leaves = jax.tree.leaves(nnx.state(self))
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
            raise ValueError(
                f"this {type(self).__name__} has shapes in place of weights: make it without nnx.eval_shape, or merge "
                "it with arrays (models.merge)"
            )
        if not _are_there(leaves, _ARRAYS[:2]) or not _are_there(jax.tree.leaves((arguments, tap)), _ARRAYS):
            found, recorded = _watched(self, method, arguments, tap, static)
        else:
            graph, params, state = split(self)
            fixed = (method, *sorted(static.items()))
            found, recorded, after = _compiled(graph, fixed, params, state, arguments, tap)
            _write(self, {name: value for name, value in after.items() if name in state})
        if tap is not None:
            for one, values in zip((one for one in parts(tap) if hasattr(one, "is_record")), recorded, strict=True):
                one._values = values
        return found


def _natural(name: str) -> list[tuple[int, str]]:
    """For sorting: numbers in a name by their value."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"[.]", name)]


def _watched(model: Any, method: str, arguments: Any, tap: Any, static: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """What a method gives, and what was recorded."""
    watch = None if tap is None else Watch(tap, model.depth)
    found = getattr(model, method)(*arguments, watch, **static)
    return found, [] if watch is None else watch.finish(model.depth)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(
    graph: Graph, fixed: tuple[Any, ...], params: Any, state: Any, arguments: Any, tap: Any
) -> tuple[Any, list[Any], Any]:
    """A call of a model, for calls outside of any program."""
    model: Any = merge(graph, params, state)
    method, *static = fixed
    found, recorded = _watched(model, method, arguments, tap, dict(static))
    return found, recorded, split(model)[2] if dict(static).get("train") else {}


_ARRAYS = (jax.Array, np.ndarray, np.generic, int, float)


def _are_there(leaves: list[Any], kinds: tuple[type, ...]) -> bool:
    """Whether these are numbers, which can be handed to a compiled function."""
    return all(isinstance(leaf, kinds) and not isinstance(leaf, jax.core.Tracer) for leaf in leaves)


def _write(model: nnx.Module, state: Mapping[str, Any]) -> None:
    if state:
        paths = {".".join(map(str, path)): path for path, _ in nnx.to_flat_state(nnx.state(model))}
        nnx.update(model, nnx.from_flat_state({paths[name]: value for name, value in state.items()}))
