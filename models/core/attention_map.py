"""What a model looks at, on the grid of the image: `attention_map` of one attention, `attention_rollout` of all."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

import naming
from attn import Grid
from models.core.rollout import rolled
from models.core.stack import Stack
from models.core.tap import Site, tap
from models.core.taps import Record
from models.core.token_maps import mean_row, queries_with_maps, real_grids

if TYPE_CHECKING:
    from models.core.map_picture import Picture

Query = None | str | tuple[int, int]


@dataclasses.dataclass(frozen=True)
class AttentionMap:
    """Shares of what is looked at, by place. Of a single image the axis B is left out.

    Attributes:
      values: shares of the places, float32; `values.sum` with those of `prefix` and `outside` is 1.
      prefix: shares of the tokens without a place (class token, registers), in their order.
      outside: share of what is no token: padding, or what lies outside of the image (halo attention).
      layer: the attention, `"stages.2.blocks.5.attn"`; `"rollout"` for all.
      heads: which head each entry of the axis H is of; `("mean",)` for the mean of all.
      query: who looks: `"cls"`, a place `(row, column)`, or `"mean"`, all of them.
      queries: the grid that the query is a place of.
    """

    values: Float[Array, "*B H Y X"]
    prefix: Float[Array, "*B H P"]
    outside: Float[Array, "*B H"]
    layer: str
    heads: tuple[int | str, ...]
    query: Query
    queries: Grid

    def _repr_png_(self) -> bytes:
        """For notebooks: the picture without images."""
        return self.plot()._repr_png_()

    def plot(self, images: Any = None, *, alpha: float = 0.6) -> Picture:
        """A picture: a row for each image, beside it a panel for each head. See `models.core.map_picture.plot`."""
        from models.core.map_picture import plot  # matplotlib takes half a second to import

        return plot(self, images, alpha=alpha)


def attention_map(
    model: Any,
    images: Float[Array, "*B Y X I"],
    *,
    layer: int | str | None = None,
    head: int | str | None = None,
    query: Query = None,
) -> AttentionMap:
    """What one attention of a model looks at, brought to the grid of the image from whatever it is computed on.

    These are the probabilities that weigh the values, exactly: a map of a window is zero outside of the window. A place
    that several windows of outlook attention hold has the mean of its windows.

    Args:
      images: `[B, Y, X, I]`, or one `[Y, X, I]`, normalized as the model takes them.
      layer: a number through the model, as taps count, negative ones from the end; or a name as in summaries,
        `"blocks.3"`, `"stages.2.blocks.5"`, of which the last attention is meant that there is under it (`"stages.2"`),
        down to one of several in a layer, `"stages.2.blocks.5.attn_grid"`. None: the last one with maps over places.
      head: its number; `"mean"` for the mean of all; None for each.
      query: who looks: `"cls"`, the class token; `(row, column)` of the map of this layer; `"mean"`, all places alike.
        None: the class token where there is one in this layer, else all places alike.

    Raises:
      ValueError: there is no such layer, head or query, or a layer has no map over places; one line says what there is.
    """
    images, single = _batch(images)
    found = attentions(model, images)
    chosen = _named(found, layer, model)
    heads = _heads(chosen, head)
    query, weights = _weights(chosen, query, model)
    row_tap = _Row(weights, (chosen.layer,), chosen.path)
    model(images, tap=row_tap)
    (row,) = (values[0] for values in row_tap.values.arrays.values())
    if head == "mean":
        row = row.mean(1, keepdims=True)
    elif head is not None:
        row = row[:, heads[0]][:, None]
    return _on_grid(row, chosen, single, heads, query)


def attention_rollout(
    model: Any,
    images: Float[Array, "*B Y X I"],
    *,
    query: Query = None,
    residual: float = 0.5,
    layers: Sequence[int] | None = None,
) -> AttentionMap:
    """Which places of the first map reach the class token, or a place, through all layers (`models.rollout`).

    Args:
      images, query: as for `attention_map`; places are those of the last map.
      residual, layers: as for `models.rollout`.

    Raises:
      ValueError: no attention of the model has maps over places; a query that there is not; one line.
    """
    images, single = _batch(images)
    total, queries, keys = rolled(model, images, residual=residual, layers=layers)
    last = Attention("rollout", -1, "", 1, queries, keys, np.ones(queries.tokens, bool), "")
    query, weights = _weights(last, query, model)
    row = jnp.einsum("bnm,n->bm", total, weights)[:, None]
    return _on_grid(row, last, single, ("mean",), query)


# --- the attentions of a model ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Attention:
    """One attention of a model.

    Attributes:
      name: path with the number of the layer, as parameters are named, `"stages.2.blocks.5.attn"`.
      layer, path: as taps are told.
      heads: of its maps.
      queries, keys: grids of its maps.
      looks: which queries have a map.
      lacks: why it has no map over the places of an image; empty where it has one.
    """

    name: str
    layer: int
    path: str
    heads: int
    queries: Grid
    keys: Grid
    looks: np.ndarray
    lacks: str


def attentions(model: Any, images: Float[Array, "B Y X I"]) -> list[Attention]:
    """All attentions that a model has for such images, in order. The model is traced, not run."""
    stacks = {part.name: part.first for _, part in nnx.iter_modules(model) if isinstance(part, Stack)}
    seen: dict[tuple[int, str], Attention] = {}

    # The pooled features too, so that a model without any attention is no error of the tap.
    @tap("probs", "pooled")
    def look(site: Site, value: Array) -> Array:
        if site.name == "probs":
            about = _about(site, value)
            for layer in site.span:
                name = _name(site.path, layer, stacks)
                seen[layer, site.path] = Attention(name, layer, site.path, value.shape[site.axis("heads")], *about)
        return value

    jax.eval_shape(lambda images: model(images, tap=look), images)
    return sorted(seen.values(), key=lambda one: one.layer)


def _about(site: Site, value: Array) -> tuple[Grid, Grid, np.ndarray, str]:
    """Grids of queries and keys, which queries look, and why there is no map over places."""
    nowhere = Grid(())
    if site.index is None:
        lacks = "keys that are pooled, no places" if "windows" in site.axes else "maps of channels for channels"
        return nowhere, nowhere, np.zeros(0, bool), lacks
    queries, keys = real_grids(site)
    lacks = "" if len(keys.shape) == 2 else f"keys on a grid of {len(keys.shape)} axes"
    return queries, keys, queries_with_maps(site), lacks


def _name(path: str, layer: int, stacks: dict[str, int]) -> str:
    """`"stages.2.blocks.attn"` of layer 9 as `"stages.2.blocks.5.attn"`."""
    for name, first in stacks.items():
        if path.startswith(f"{name}."):
            return f"{name}.{layer - first}{path.removeprefix(name)}"
    return path


# --- what is asked for ------------------------------------------------------------------------------------------------


def _batch(images: Any) -> tuple[Array, bool]:
    images = jnp.asarray(images)
    return (images[None], True) if images.ndim == 3 else (images, False)


def _named(found: list[Attention], layer: int | str | None, model: Any) -> Attention:
    """The attention that is meant: the last with a map over places of those that a layer or a name stands for."""
    usable = [one for one in found if not one.lacks]
    kind = type(model).__name__
    if not usable:
        raise ValueError(f"a {kind} has no attention with a map over places{_lacking(found)}")
    if layer is None:
        return usable[-1]
    allowed = f"allowed: {', '.join(folded([one.name for one in usable]))}"
    if isinstance(layer, str):
        meant = [one for one in found if f"{one.name}.".startswith(f"{layer}.")]
        if not meant:
            parts = {one.name.rpartition(".")[0] for one in usable} | {one.name for one in usable}
            raise ValueError(f"unknown layer {layer!r}{naming.hint(layer, sorted(parts), most=1)}; {allowed}")
    elif isinstance(layer, bool) or not isinstance(layer, int | np.integer) or not -model.depth <= layer < model.depth:
        numbers = f"allowed: 0 to {model.depth - 1}, or from the end -1 to -{model.depth}"
        raise ValueError(f"layer={layer!r} of a {kind}; {numbers}; as names {allowed}")
    else:
        meant = [one for one in found if one.layer == layer % model.depth]
    if not any(not one.lacks for one in meant):
        raise ValueError(f"layer {layer!r} has no map over places{_lacking(meant)}; {allowed}")
    return [one for one in meant if not one.lacks][-1]


def _lacking(found: list[Attention]) -> str:
    """What there is in place of maps over places, and how to see it."""
    if not found:
        return ": it has no attention"
    one = found[-1]
    return f": it has {one.lacks}, which models.record('probs', layers=[{one.layer}]) gives"


def folded(names: Sequence[str]) -> list[str]:
    """Names that differ in the number of the layer as one: `blocks.[0:12].attn`, or of every other one
    `blocks.[0:11:2].attn`.
    """
    runs: dict[tuple[str, str], list[int]] = {}
    for name in names:
        before, number, after = _NUMBERED.fullmatch(name).groups()  # type: ignore[union-attr]
        runs.setdefault((before or "", after), []).extend([int(number)] if number else [])
    return [before + _slice(numbers) + after for (before, after), numbers in runs.items()]


_NUMBERED = re.compile(r"(?:(.*\.)?(\d+)(?=\.))?([^\d]*)")
"""The last number of a name, what stands before it and behind."""


def _slice(numbers: Sequence[int]) -> str:
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    step = numbers[1] - numbers[0]
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1, step)):
        return f"[{numbers[0]}:{numbers[-1] + 1}{f':{step}' if step > 1 else ''}]"
    return f"[{','.join(map(str, numbers))}]"


def _heads(one: Attention, head: int | str | None) -> tuple[int | str, ...]:
    if head is None:
        return tuple(range(one.heads))
    if head == "mean":
        return ("mean",)
    if isinstance(head, bool) or not isinstance(head, int | np.integer) or not 0 <= head < one.heads:
        raise ValueError(f"head={head!r} of {one.name}; allowed: 0 to {one.heads - 1}, 'mean', None for each")
    return (int(head),)


def _weights(one: Attention, query: Any, model: Any) -> tuple[Query, np.ndarray]:
    """The query by name, and what each token of the grid of queries counts."""
    grid, looks = one.queries, one.looks
    has_class = bool(grid.prefix and looks[0] and getattr(model, "cls_token", True) is not None)
    places = looks.copy()
    places[: grid.prefix] = False
    if query is None:
        query = "cls" if has_class else "mean"
    weights = np.zeros(grid.tokens, np.float32)
    if query == "cls" and has_class:
        weights[0] = 1
        return "cls", weights
    if query == "mean" and places.any():
        weights[places] = 1 / places.sum()
        return "mean", weights
    if isinstance(query, tuple | list) and len(query) == len(grid.shape):
        whole = all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in query)
        if whole and all(0 <= n < side for n, side in zip(query, grid.shape, strict=True)):
            token = grid.prefix + int(np.ravel_multi_index(tuple(query), grid.shape))
            if looks[token]:
                weights[token] = 1
                return tuple(map(int, query)), weights  # type: ignore[return-value]
    allowed = ["'cls'"] if has_class else []
    allowed += ["'mean'"] if places.any() else []
    hint = naming.hint(query, [name.strip("'") for name in allowed], most=1) if isinstance(query, str) else ""
    if places.sum() > 1:
        last = tuple(side - 1 for side in grid.shape)
        allowed.append(f"a place (row, column) from {(0,) * len(last)} to {last}")
    raise ValueError(f"query={query!r} of {one.name}{hint}; allowed: {', '.join(allowed)}")


class _Row(Record):
    """Keeps what some queries of one attention look at, their weighted mean: `[B, H, M]`."""

    def __init__(self, weights: Any, layers: tuple[int, ...] | None, at: str | None):
        super().__init__(("probs",), layers, at)
        self.weights = weights

    def kept(self, site: Site, value: Array) -> Array | None:
        return None if site.index is None else mean_row(site, value, self.weights)


# The weights are an array of the compiled call, which so serves every query.
jax.tree_util.register_pytree_node(
    _Row,
    lambda one: ((one.weights,), (one.layers, one.at)),
    lambda about, leaves: _Row(leaves[0], *about),
)


def _on_grid(
    row: Float[Array, "B H M"], one: Attention, single: bool, heads: tuple[int | str, ...], query: Query
) -> AttentionMap:
    keys = one.keys
    outside = jnp.maximum(1 - row.sum(-1), 0)  # the sum may be larger by a rounding
    values = row[..., keys.prefix :].reshape(*row.shape[:2], *keys.shape)
    values, prefix, outside = (part[0] if single else part for part in (values, row[..., : keys.prefix], outside))
    return AttentionMap(values, prefix, outside, one.name, heads, query, one.queries)
