"""A stack of blocks: one `jax.lax.scan` over layers, or its unrolled twin with the same numbers.

A stack repeats a group of blocks, which may be unlike each other: with the group (window, grid) and depth 4 the layers
are window, grid, window, grid; the last repetition may be incomplete. Scanned, every member of the group holds one leaf
for all of its layers, so compile time does not grow with depth. Unrolled, every layer is a module of its own. Both draw
the same initial numbers and the same random numbers, and their parameters differ only by `models.stack` and
`models.unstack`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from models.core.call import Call
from models.core.draw import concrete, placed
from models.core.remat import rematerialized
from models.core.watch import Frame

MakeBlock = Callable[[nnx.Rngs], nnx.Module]
Leaves = dict[tuple[Any, ...], Any]


class Stack(nnx.Module):
    """`depth` layers, layer i made by `makers[i % len(makers)]`.

    A block is called as `block(x, call)` and returns the new x, of the same shape and dtype, or with state
    `(x, new state)`. Children are named by layer (`"3"`) or, scanned, by the slice of layers they hold (`"[0::1]"`), so
    parameter names need no translation.

    Args:
      name: of the stack in its model: for taps, errors and summaries.
      first: number in its model of the stack's first layer, from which blocks and taps count.
    """

    def __init__(
        self,
        makers: Sequence[MakeBlock],
        depth: int,
        *,
        rngs: nnx.Rngs,
        name: str = "blocks",
        first: int = 0,
        scan: bool = True,
        remat: str = "auto",
    ):
        if not makers:
            raise ValueError(f"{name}: a group of no blocks makes no stack")
        if depth < len(makers):
            raise ValueError(f"{name}: depth {depth} is less than the {len(makers)} blocks of a group")
        self.name, self.depth, self.group, self.scan, self.remat = name, depth, len(makers), scan, remat
        self.first = first
        base = rngs.params()
        for member, make in enumerate(makers):
            layers = range(member, depth, self.group)
            definition, made = _initialize(make, base, layers, scan)
            if scan:
                setattr(self, self._slice(member), _merge(definition, made))
                continue
            for layer, leaves in zip(layers, made, strict=True):
                setattr(self, str(layer), _merge(definition, leaves))

    def _slice(self, member: int) -> str:
        return f"[{member}::{self.group}]"

    @property
    def blocks(self) -> list[Any]:
        """The modules that hold the layers: one a layer, or scanned one a member of the group."""
        names = map(self._slice, range(self.group)) if self.scan else map(str, range(self.depth))
        return [getattr(self, name) for name in names]

    def __call__(
        self,
        x: Any,
        call: Call,
        *,
        drop_path: Sequence[float] | Array | np.ndarray | None = None,
        layers: Sequence[int] = (),
    ) -> tuple[Any, dict[str, Array]]:
        """`(x, outputs of chosen layers)` after all layers; with state in the call `((x, new state), outputs)`.

        Args:
          x: an array, or a pytree of arrays, that every layer maps to the same shapes and dtypes.
          call: of the model. Layer i gets its number, its path, and `fold_in(key, i)`. `call.state` is that of all
            layers, a pytree whose arrays have a leading axis `depth`.
          drop_path: rates by layer.
          layers: whose outputs to return, as `"3"`; numbers within the stack, negative ones count from the end. Memory
            is that of the chosen layers, not of all.

        State that is not a parameter (batch statistics) is updated in place, as everywhere in NNX.
        """
        chosen = self._chosen(layers)
        own: dict[str, Any] = {}
        if drop_path is not None:
            own["drop_path"] = jnp.asarray(drop_path, jnp.float32)
        if call.state is not None:
            own["state"] = call.state
        self._flush(call)
        run = self._scanned if self.scan else self._unrolled
        with_name = call.replace(path=f"{call.path}.{self.name}" if call.path else self.name, state=None)
        x, state, found = run(x, with_name, own, chosen)
        return (x if call.state is None else (x, state)), found

    def _chosen(self, layers: Sequence[int]) -> list[int]:
        for layer in layers:
            if not -self.depth <= layer < self.depth:
                raise ValueError(f"{self.name}: no layer {layer}, there are {self.depth}")
        return sorted({layer % self.depth for layer in layers})

    def _layer(
        self, definition: nnx.GraphDef, call: Call, span: tuple[int, ...], inside_scan: bool
    ) -> Callable[[Any, Leaves, Any, Mapping[str, Any]], _Result]:
        """A layer as a function of its input, leaves, number and what is its own."""

        def run(x: Any, leaves: Leaves, layer: Any, own: Mapping[str, Any]) -> _Result:
            block = _merge(definition, leaves)
            mine = call.replace(
                layer=layer + self.first,
                span=tuple(number + self.first for number in span),
                key=None if call.key is None else jax.random.fold_in(call.key, layer),
                **own,
            )
            found = block(x, mine)
            x, state = found if "state" in own else (found, None)
            frame = {} if call.tap is None else call.tap.framed()
            return _Result(x, state, frame, _changed_state(block, leaves))

        return rematerialized(run, self.remat, inside_scan=inside_scan)

    @staticmethod
    def _flush(call: Call) -> None:
        """What was recorded before the stack belongs to no layer of it."""
        if call.tap is not None:
            call.tap.keep(call.tap.framed(), int(call.layer))

    def _keep(self, call: Call, frame: Frame, layer: int) -> None:
        if call.tap is not None:
            call.tap.keep(frame, layer + self.first)

    def _unrolled(self, x: Any, call: Call, own: dict[str, Any], chosen: list[int]) -> tuple[Any, Any, dict[str, Any]]:
        outputs: dict[str, Any] = {}
        states = []
        for layer in range(self.depth):
            block = getattr(self, str(layer))
            definition, leaves = _split(block)
            with jax.named_scope(f"{self.name}.{layer}"):
                run = self._layer(definition, call, (layer,), False)
                result = run(x, leaves, layer, jax.tree.map(lambda rows, layer=layer: rows[layer], own))
            x = result.x
            states.append(result.state)
            _update(block, result.variables)
            self._keep(call, result.frame, layer)
            if layer in chosen:
                outputs[str(layer)] = x
        state = jax.tree.map(lambda *rows: jnp.stack(rows), *states) if "state" in own else None
        return x, state, outputs

    def _scanned(self, x: Any, call: Call, own: dict[str, Any], chosen: list[int]) -> tuple[Any, Any, dict[str, Any]]:
        blocks = self.blocks
        halves = [_split(block) for block in blocks]
        repeats, rest = divmod(self.depth, self.group)
        whole = repeats * self.group
        spans = [tuple(range(member, whole, self.group)) for member in range(self.group)]
        kept = [self._kept(call, span) for span in spans]
        # Which row of a member's buffer a repetition fills; -1 for the layers nobody asked for.
        wanted = [[layer for layer in span if layer in chosen] for span in spans]
        slots, recorded = (_slots(rows, repeats, self.group) for rows in (wanted, kept))
        runs = [self._layer(halves[member][0], call, spans[member], True) for member in range(self.group)]

        def repeat(carry: Any, inputs: Any) -> Any:
            x, buffers = carry
            number, leaves, arguments, slot, record = inputs
            buffers, states, variables = list(buffers), [], []
            for member, run in enumerate(runs):
                with jax.named_scope(f"{self.name}.{self._slice(member)}"):
                    layer = number * self.group + member
                    result = run(x, leaves[member], layer, jax.tree.map(lambda rows, m=member: rows[m], arguments))
                x = result.x
                states.append(result.state)
                variables.append(result.variables)
                output, frame = buffers[member]
                buffers[member] = (
                    _store(output, x, slot[member]) if wanted[member] else output,
                    _store(frame, result.frame, record[member]) if kept[member] else frame,
                )
            return (x, buffers), (states, variables)

        leaves = [leaves for _, leaves in halves]
        for member in range(rest):
            with jax.named_scope(f"{self.name}.{self._slice(member)}"):
                leaves[member] = {path: leaf[:repeats] for path, leaf in leaves[member].items()}
        arguments = jax.tree.map(lambda rows: rows[:whole].reshape(repeats, self.group, *rows.shape[1:]), own)
        inputs = (jnp.arange(repeats), leaves, arguments, jnp.asarray(slots), jnp.asarray(recorded))
        buffers = self._buffers(runs, wanted, kept, x, inputs)
        (x, buffers), (states, variables) = jax.lax.scan(repeat, (x, buffers), inputs)

        outputs: dict[str, Any] = {}
        for member, (output, frame) in enumerate(buffers):
            for row, layer in enumerate(wanted[member]):
                outputs[str(layer)] = jax.tree.map(lambda rows, row=row: rows[row], output)
            for row, layer in enumerate(kept[member]):
                self._keep(call, {key: rows[row] for key, rows in frame.items()}, layer)

        # What is left of an incomplete repetition, one layer after the other.
        last_states = []
        for member, layer in enumerate(range(whole, self.depth)):
            definition, stacked = halves[member]
            last = {path: leaf[repeats] for path, leaf in stacked.items()}
            with jax.named_scope(f"{self.name}.{self._slice(member)}"):
                run = self._layer(definition, call, (layer,), False)
                result = run(x, last, layer, jax.tree.map(lambda rows, layer=layer: rows[layer], own))
            x = result.x
            last_states.append(result.state)
            variables[member] = {
                path: jnp.append(variables[member][path], new[None], 0) for path, new in result.variables.items()
            }
            self._keep(call, result.frame, layer)
            if layer in chosen:
                outputs[str(layer)] = x

        for block, new in zip(blocks, variables, strict=True):
            _update(block, new)
        state = self._interleaved(states, last_states) if "state" in own else None
        return x, state, {name: outputs[name] for name in sorted(outputs, key=int)}

    def _kept(self, call: Call, span: tuple[int, ...]) -> list[int]:
        """Layers of a member that some tap records."""
        if call.tap is None:
            return []
        records = [one for one in call.tap.taps if getattr(one, "is_record", False)]
        return [
            layer for layer in span if any(one.layers is None or layer + self.first in one.layers for one in records)
        ]

    @staticmethod
    def _interleaved(states: Sequence[Any], rest: Sequence[Any]) -> Any:
        """States of all layers in order, from those of each member by repetition and those of what is left."""

        def joined(*parts: Array) -> Array:
            members = parts[: len(states)]
            rows = jnp.stack(members, 1).reshape(-1, *members[0].shape[1:])
            return jnp.concatenate([rows, *(part[None] for part in parts[len(states) :])])

        return jax.tree.map(joined, *states, *rest)

    @staticmethod
    def _buffers(runs: Any, wanted: Any, kept: Any, x: Any, inputs: Any) -> list[Any]:
        """Zeros for the chosen layers of each member, shaped by an abstract call of one layer."""
        buffers: list[Any] = []
        first = jax.tree.map(lambda leaf: leaf[0], inputs[:3])
        for member, run in enumerate(runs):
            if not wanted[member] and not kept[member]:
                buffers.append(((), ()))
                continue

            def one_layer(x: Any, first: Any, run: Any = run, member: int = member) -> tuple[Any, Any]:
                number, leaves, arguments = first
                mine = jax.tree.map(lambda leaf, member=member: leaf[member], arguments)
                result = run(x, leaves[member], number, mine)
                return result.x, result.frame

            shapes = jax.eval_shape(one_layer, x, first)
            both = (wanted[member], kept[member])
            buffers.append(tuple(_zeros(shape, len(layers)) for shape, layers in zip(shapes, both, strict=True)))
        return buffers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Result:
    """Of one layer: the new x, its state, what taps recorded, and variables that were written."""

    x: Any
    state: Any
    frame: Frame
    variables: Leaves


def shortest_cycle(layers: Sequence[Any]) -> tuple[Any, ...]:
    """The shortest group whose repetition, the last one perhaps incomplete, gives these layers.

    >>> shortest_cycle("abab"), shortest_cycle("aaba"), shortest_cycle("")
    (('a', 'b'), ('a', 'a', 'b'), ())
    """
    depth = len(layers)
    periods = (p for p in range(1, depth + 1) if all(layers[i] == layers[i % p] for i in range(depth)))
    return tuple(layers[: next(periods, 0)])


def run_alone(block: nnx.Module, x: Any, call: Call, *, remat: str) -> Any:
    """`block(x, call)` of a block outside of any stack, rematerialized as those in one are; its state is updated in
    place, and what taps recorded is kept.
    """
    definition, leaves = _split(block)
    if call.tap is not None:
        call.tap.keep(call.tap.framed(), int(call.layer))

    def run(x: Any, leaves: Leaves) -> tuple[Any, Any, Any]:
        copy = _merge(definition, leaves)
        y = copy(x, call)
        return y, ({} if call.tap is None else call.tap.framed()), _changed_state(copy, leaves)

    x, frame, variables = rematerialized(run, remat, inside_scan=False)(x, leaves)
    _update(block, variables)
    if call.tap is not None:
        call.tap.keep(frame, int(call.layer))
    return x


def _initialize(make: MakeBlock, base: PRNGKeyArray, layers: Sequence[int], scan: bool) -> tuple[nnx.GraphDef, Any]:
    """Blocks of these layers, layer i from the key `fold_in(base, i)`: their common definition, and leaves with a
    leading layer axis, or without `scan` a list of each layer's.
    """
    definitions = []

    def initial(key: PRNGKeyArray) -> Leaves:
        definition, leaves = _split(make(nnx.Rngs(key)))
        definitions.append(definition)
        return leaves

    if concrete(base):
        # Outside of a transformation, vmap would compile every operation for every shape and number of layers.
        each = [initial(jax.random.fold_in(base, layer)) for layer in layers]
        if not scan:
            return definitions[0], each
        return definitions[0], {
            path: jax.tree.map(_stacked, *(own.pop(path) for own in each)) for path in list(each[0])
        }
    leaves = jax.vmap(initial)(jax.vmap(jax.random.fold_in, (None, 0))(base, jnp.asarray(layers)))
    if scan:
        return definitions[0], leaves
    rows = range(len(layers))
    return definitions[0], [
        {path: jax.tree.map(lambda leaf, row=row: leaf[row], leaf) for path, leaf in leaves.items()} for row in rows
    ]


def _stacked(*values: Any) -> Array:
    def usual(value: Any) -> bool:
        special = not isinstance(value, jax.Array) or jnp.issubdtype(value.dtype, jax.dtypes.extended)
        return not special and not value.committed

    return placed(np.stack(jax.device_get(values))) if all(map(usual, values)) else jnp.stack(values)


def _split(block: nnx.Module) -> tuple[nnx.GraphDef, Leaves]:
    definition, state = nnx.split(block)
    return definition, {path: variable.get_value() for path, variable in nnx.to_flat_state(state)}


def _merge(definition: nnx.GraphDef, leaves: Any) -> nnx.Module:
    return nnx.merge(definition, nnx.from_flat_state(leaves))


def _changed_state(block: nnx.Module, before: Leaves) -> Leaves:
    """What a call wrote: only that is carried out of the scan, so a pure call writes nothing back."""
    _, after = _split(block)
    return {path: value for path, value in after.items() if value is not before[path]}


def _update(block: nnx.Module, state: Any) -> None:
    if state:
        nnx.update(block, nnx.from_flat_state(state))


def _slots(wanted: Sequence[Sequence[int]], repeats: int, group: int) -> np.ndarray:
    slots = np.full((repeats, group), -1, np.int32)
    for member, layers in enumerate(wanted):
        slots[[layer // group for layer in layers], member] = np.arange(len(layers))
    return slots


def _zeros(shapes: Any, rows: int) -> Any:
    """A buffer of so many rows for every leaf; none for none."""
    return jax.tree.map(lambda shape: jnp.zeros((rows, *shape.shape), shape.dtype), shapes) if rows else ()


def _store(buffer: Any, value: Any, slot: Array) -> Any:
    """`value` into row `slot` of every buffer leaf; a negative slot leaves the buffer as it was."""

    def store(rows: Array, new: Array) -> Array:
        row = jnp.maximum(slot, 0)
        kept = jax.lax.dynamic_index_in_dim(rows, row, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(rows, jnp.where(slot >= 0, new, kept), row, 0)

    return jax.tree.map(store, buffer, value)
