"""A stack of blocks: one `jax.lax.scan` over layers, or its unrolled twin with the same numbers.

A stack repeats a group of blocks, which may be unlike each other: with the group (window, grid) and depth 4 the layers
are window, grid, window, grid; the last repetition may be incomplete. Scanned, every member of the group holds one leaf
for all of its layers, so compile time does not grow with depth. Unrolled, every layer is a module of its own. Both draw
the same initial numbers and the same random numbers, and their parameters differ only by `models.core.stack` and
`models.unstack`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from attn import Grid, Hook
from models.core.remat import rematerialized

MakeBlock = Callable[[nnx.Rngs], nnx.Module]
Leaves = dict[tuple[Any, ...], Any]


class Stack(nnx.Module):
    """`depth` layers, layer i made by `makers[i % len(makers)]`.

    A block is called as `block(x, grid, *, context, mask, hook, layer, train, key, **per_layer)` and returns the new x,
    of the same shape and dtype. Children are named by layer (`"3"`) or, scanned, by the slice of layers they hold
    (`"[0::1]"`), so parameter names need no translation.

    Args:
      name: of the stack in its model, for errors and summaries.
      first: number in its model of the stack's first layer, from which blocks and hooks count.
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
        remat: str = "none",
    ):
        if depth < len(makers):
            raise ValueError(f"{name}: depth {depth} is less than the {len(makers)} blocks of a group")
        self.name, self.depth, self.group, self.scan, self.remat = name, depth, len(makers), scan, remat
        self.first = first
        base = rngs.params()
        for member, make in enumerate(makers):
            layers = range(member, depth, self.group)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(base, jnp.asarray(layers))
            definition, leaves = _initialize(make, keys)
            if scan:
                setattr(self, self._slice(member), _merge(definition, leaves))
                continue
            for index, layer in enumerate(layers):
                setattr(self, str(layer), _merge(definition, {path: leaf[index] for path, leaf in leaves.items()}))

    def _slice(self, member: int) -> str:
        return f"[{member}::{self.group}]"

    def __call__(
        self,
        x: Array,
        grid: Grid,
        *,
        per_layer: Mapping[str, Any] | None = None,
        context: Array | None = None,
        mask: Array | None = None,
        hook: Hook | None = None,
        train: bool = False,
        key: PRNGKeyArray | None = None,
        layers: Sequence[int] = (),
        sites: Sequence[str] = (),
    ) -> tuple[Array, dict[str, Array]]:
        """`(x, intermediates)` after all layers.

        Args:
          x: an array, or a pytree of arrays, that every layer maps to the same shapes and dtypes.
          per_layer: keyword arguments of the blocks with a leading axis `depth`, such as drop-path rates.
          key: layer i receives `fold_in(key, i)`.
          hook: is given the layer's number in the model, which is traced when the stack is scanned.
          layers: whose outputs to return, as `"3"`; numbers within the stack, negative ones count from the end.
          sites: hook sites of these layers to return as well, as `"3.probs"`; a site reached again within a layer gets
            a number (`"3.probs.1"`). Memory is that of the chosen layers, not of all.

        State that is not a parameter (batch statistics) is updated in place, as everywhere in NNX.
        """
        chosen = self._chosen(layers)
        values = {name: jnp.asarray(value) for name, value in (per_layer or {}).items()}

        def layer_function(definition: nnx.GraphDef, sites: Sequence[str], inside_scan: bool) -> Callable:
            def run(x: Any, leaves: Leaves, layer: Any, arguments: dict[str, Any]):
                block = _merge(definition, leaves)
                records: dict[str, Array] = {}
                x = block(
                    x,
                    grid,
                    context=context,
                    mask=mask,
                    hook=recording(hook, sites, records) if sites else hook,
                    layer=layer + self.first,
                    train=train,
                    key=None if key is None else jax.random.fold_in(key, layer),
                    **arguments,
                )
                return x, records, _changed_state(block, leaves)

            return rematerialized(run, self.remat, inside_scan=inside_scan)

        if self.scan:
            return self._scanned(x, layer_function, values, chosen, sites)
        return self._unrolled(x, layer_function, values, chosen, sites)

    def _chosen(self, layers: Sequence[int]) -> list[int]:
        for layer in layers:
            if not -self.depth <= layer < self.depth:
                raise ValueError(f"{self.name}: no layer {layer}, there are {self.depth}")
        return sorted({layer % self.depth for layer in layers})

    def _unrolled(self, x, layer_function, values, chosen, sites):
        intermediates: dict[str, Array] = {}
        for layer in range(self.depth):
            block = getattr(self, str(layer))
            definition, leaves = _split(block)
            run = layer_function(definition, sites if layer in chosen else (), False)
            with jax.named_scope(f"{self.name}.{layer}"):
                x, records, state = run(x, leaves, layer, {name: value[layer] for name, value in values.items()})
            _update(block, state)
            if layer in chosen:
                intermediates |= _by_layer(layer, x, records)
        return x, intermediates

    def _scanned(self, x, layer_function, values, chosen, sites):
        blocks = [getattr(self, self._slice(member)) for member in range(self.group)]
        halves = [_split(block) for block in blocks]
        repeats, rest = divmod(self.depth, self.group)
        whole = repeats * self.group
        # Which row of a member's buffer a repetition fills; -1 for the layers nobody asked for.
        wanted = [
            [layer for layer in chosen if layer < whole and layer % self.group == member]
            for member in range(self.group)
        ]
        slots = np.full((repeats, self.group), -1, np.int32)
        for member, layers in enumerate(wanted):
            slots[[layer // self.group for layer in layers], member] = np.arange(len(layers))
        runs = [
            layer_function(definition, sites if layers else (), True)
            for (definition, _), layers in zip(halves, wanted, strict=True)
        ]

        def repeat(carry, inputs):
            x, buffers = carry
            number, leaves, arguments, slot = inputs
            buffers, states = list(buffers), []
            for member, run in enumerate(runs):
                with jax.named_scope(f"{self.name}.{self._slice(member)}"):
                    layer = number * self.group + member
                    x, records, state = run(x, leaves[member], layer, {k: v[member] for k, v in arguments.items()})
                states.append(state)
                if wanted[member]:
                    buffers[member] = _store(buffers[member], (x, records), slot[member])
            return (x, buffers), states

        leaves = [leaves for _, leaves in halves]
        for member in range(rest):
            with jax.named_scope(f"{self.name}.{self._slice(member)}"):
                leaves[member] = {path: leaf[:repeats] for path, leaf in leaves[member].items()}
        arguments = {
            name: value[:whole].reshape(repeats, self.group, *value.shape[1:]) for name, value in values.items()
        }
        inputs = (jnp.arange(repeats), leaves, arguments, jnp.asarray(slots))
        buffers = self._buffers(runs, wanted, x, inputs)
        (x, buffers), states = jax.lax.scan(repeat, (x, buffers), inputs)

        intermediates: dict[str, Array] = {}
        for layers, buffer in zip(wanted, buffers, strict=True):
            for row, layer in enumerate(layers):
                output, records = jax.tree.map(lambda rows, row=row: rows[row], buffer)
                intermediates |= _by_layer(layer, output, records)

        # What is left of an incomplete repetition, one layer after the other.
        for member, layer in enumerate(range(whole, self.depth)):
            definition, stacked = halves[member]
            run = layer_function(definition, sites if layer in chosen else (), False)
            last = {path: leaf[repeats] for path, leaf in stacked.items()}
            with jax.named_scope(f"{self.name}.{self._slice(member)}"):
                x, records, state = run(x, last, layer, {name: value[layer] for name, value in values.items()})
            states[member] = {path: jnp.append(states[member][path], new[None], 0) for path, new in state.items()}
            if layer in chosen:
                intermediates |= _by_layer(layer, x, records)

        for block, state in zip(blocks, states, strict=True):
            _update(block, state)
        return x, intermediates

    @staticmethod
    def _buffers(runs, wanted, x, inputs) -> list[Any]:
        """Zeros for the chosen layers of each member, shaped by an abstract call of one layer."""
        buffers: list[Any] = []
        for member, (run, layers) in enumerate(zip(runs, wanted, strict=True)):
            if not layers:
                buffers.append(())
                continue
            first = jax.tree.map(lambda leaf: leaf[0], inputs)

            def one_layer(x, first, run=run, member=member):
                number, leaves, arguments, _ = first
                return run(x, leaves[member], number, {name: value[member] for name, value in arguments.items()})[:2]

            shapes = jax.eval_shape(one_layer, x, first)
            rows = len(layers)
            buffers.append(jax.tree.map(lambda s, rows=rows: jnp.zeros((rows, *s.shape), s.dtype), shapes))
        return buffers


def shortest_cycle(layers: Sequence[Any]) -> tuple[Any, ...]:
    """The shortest group whose repetition, the last one perhaps incomplete, gives these layers.

    >>> shortest_cycle("abab"), shortest_cycle("aaba"), shortest_cycle("")
    (('a', 'b'), ('a', 'a', 'b'), ())
    """
    depth = len(layers)
    periods = (p for p in range(1, depth + 1) if all(layers[i] == layers[i % p] for i in range(depth)))
    return tuple(layers[: next(periods, 0)])


def run_alone(
    block: nnx.Module, x: Any, *, remat: str, hook: Hook | None, sites: Sequence[str] = (), **arguments: Any
) -> tuple[Any, dict[str, Array]]:
    """`(block(x, hook=hook, **arguments), values of the hook sites)` of a block outside of any stack, rematerialized as
    those in one are; its state is updated in place.
    """
    definition, leaves = _split(block)

    def run(x: Any, leaves: Leaves):
        copy = _merge(definition, leaves)
        records: dict[str, Array] = {}
        y = copy(x, hook=recording(hook, sites, records) if sites else hook, **arguments)
        return y, records, _changed_state(copy, leaves)

    x, records, state = rematerialized(run, remat, inside_scan=False)(x, leaves)
    _update(block, state)
    return x, records


def _initialize(make: MakeBlock, keys: PRNGKeyArray) -> tuple[nnx.GraphDef, Leaves]:
    """Blocks for all keys at once: their common definition, and leaves with a leading layer axis."""
    definitions = []

    def initial(key):
        definition, leaves = _split(make(nnx.Rngs(key)))
        definitions.append(definition)
        return leaves

    leaves = jax.vmap(initial)(keys)
    return definitions[0], leaves


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


def recording(hook: Hook | None, sites: Sequence[str], records: dict[str, Array]) -> Hook:
    """A hook that does what `hook` does and puts the values of `sites` into `records`."""

    def record(site: str, value: Array, layer: Any) -> Array:
        value = value if hook is None else hook(site, value, layer)
        if site in sites:
            again = sum(name.split(".")[0] == site for name in records)
            records[f"{site}.{again}" if again else site] = value
        return value

    looked_at = () if hook is None else getattr(hook, "sites", None)
    if looked_at is not None:
        record.sites = {*sites, *looked_at}  # type: ignore[attr-defined]
    return record


def _store(buffer: Any, value: Any, slot: Array) -> Any:
    """`value` into row `slot` of every buffer leaf; a negative slot leaves the buffer as it was."""

    def store(rows: Array, new: Array) -> Array:
        row = jnp.maximum(slot, 0)
        kept = jax.lax.dynamic_index_in_dim(rows, row, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(rows, jnp.where(slot >= 0, new, kept), row, 0)

    return jax.tree.map(store, buffer, value)


def _by_layer(layer: int, output: Any, records: dict[str, Array]) -> dict[str, Any]:
    return {str(layer): output} | {f"{layer}.{site}": value for site, value in records.items()}
