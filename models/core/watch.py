"""Taps in one forward pass: which sites they reach, what they answer, and what is recorded."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from models.core.errors import unknown_name
from models.core.tap import SITES, Site, TokenIndex, parts, wants

Frame = dict[str, Array]
"""What was recorded in one layer, by number of the tap and full name of the site."""


class Watch:
    """The taps of one forward pass.

    Args:
      depth: how many layers there are, from whose end negative numbers of layers count.

    Raises:
      ValueError: what is no tap, or one that wants a site or a layer that there is not.
    """

    def __init__(self, taps: Any, depth: int | None = None):
        self.taps = tuple(one if depth is None else _counted(one, depth) for one in parts(taps))
        for name in (name for one in self.taps for name in one.sites):
            if name not in SITES:
                raise ValueError(unknown_name("site", name, SITES))
        self._reached: dict[tuple[str, str], None] = {}
        self._met: set[int] = set()
        self._frame: Frame = {}
        self._kept: dict[str, dict[int, Array]] = {}
        self._about: dict[str, dict[int, Site]] = {}

    def wants(self, names: Iterable[str], path: str, span: tuple[int, ...]) -> bool:
        """Whether some tap may want one of these sites there."""
        return any(wants(one, name, path, span) for one in self.taps for name in names)

    def visit(self, site: Site, value: Array) -> Array:
        """The value after all taps that want the site."""
        self._reached[site.path, site.name] = None
        for number, one in enumerate(self.taps):
            if not wants(one, site.name, site.path, site.span):
                continue
            self._met.add(number)
            if getattr(one, "is_record", False):
                kept = one.kept(site, value)
                if kept is not None:
                    self._about.setdefault(site.full, {}).update(dict.fromkeys(site.span, _told(site)))
                    self._frame[f"{number}:{site.full}"] = kept
            else:
                value = _checked(site, one(site, value), value)
        return value

    def framed(self) -> Frame:
        """What was recorded since this was asked last."""
        frame, self._frame = self._frame, {}
        return frame

    def keep(self, frame: Frame, layer: int) -> None:
        """Puts what one layer recorded to what is kept."""
        for key, value in frame.items():
            wanted = self.taps[int(key.partition(":")[0])].layers
            if wanted is None or layer in wanted:
                self._kept.setdefault(key, {})[layer] = value

    def finish(self, layer: int) -> list[Recorded]:
        """Ends the pass: what each recording tap has recorded.

        Args:
          layer: number of the layers, which what is behind them is counted as.

        Raises:
          ValueError: a tap never met a site that it wants.
        """
        self.keep(self.framed(), layer)
        for number, one in enumerate(self.taps):
            if number not in self._met:
                raise ValueError(self._never_met(one))
        records = [number for number, one in enumerate(self.taps) if getattr(one, "is_record", False)]
        return [self._recorded(number) for number in records]

    def _never_met(self, one: Any) -> str:
        layers, at = getattr(one, "layers", None), getattr(one, "at", None)
        where = (f" of layers {list(layers)}" if layers is not None else "") + (f" at {at!r}" if at else "")
        names = dict.fromkeys(name for _, name in self._reached)
        paths = dict.fromkeys(path for path, name in self._reached if path and (at or name in one.sites))
        there = f"; this model has {', '.join(names)}" + (f" at {', '.join(paths)}" if paths else "")
        return f"no site {' or '.join(map(repr, one.sites))}{where} was reached{there}"

    def _recorded(self, number: int) -> Recorded:
        arrays, layers, sites = {}, {}, {}
        for full, told in self._about.items():  # in the order of the visits
            if by_layer := self._kept.get(f"{number}:{full}"):
                layers[full] = tuple(sorted(by_layer))
                if len({value.shape for value in by_layer.values()}) > 1:
                    raise ValueError(_of_shapes(full, {layer: by_layer[layer].shape for layer in layers[full]}))
                arrays[full] = jnp.stack([by_layer[layer] for layer in layers[full]])
                # Where a part is called by itself, what it emits is kept under the number that ends the pass.
                alone = next(iter(told.values()))
                sites[full] = tuple(told.get(layer, alone) for layer in layers[full])
        return Recorded(arrays, layers, {full: _of_layers(sites[full]) for full in arrays}, sites)


def _counted(one: Any, depth: int) -> Any:
    """The tap with numbers of layers from 0 on; `depth` itself is what follows the layers."""
    layers = getattr(one, "layers", None)
    if layers is None:
        return one
    for layer in layers:
        if not -depth <= layer <= depth:
            raise ValueError(f"layer {layer} of a tap; allowed: 0 to {depth - 1}, or from the end -1 to {-depth}")
    if min(layers, default=0) >= 0:
        return one
    counted = copy.copy(one)
    object.__setattr__(counted, "layers", tuple(layer % depth if layer < 0 else layer for layer in layers))
    return counted


def _told(site: Site) -> Site:
    """The site as it may be kept beyond the pass: without numbers that are not known yet."""
    index = site.index
    if index is None or not any(isinstance(x, jax.core.Tracer) for x in (index.queries, index.keys)):
        return dataclasses.replace(site, layer=0)
    untold = "has keys that depend on the images: its map is brought to tokens inside of a call, by a tap of your own"
    return dataclasses.replace(site, layer=0, index=None, untold=untold)


def _of_layers(sites: Sequence[Site]) -> Site:
    """What is told of several layers: the site of the first, without the tokens of its maps where another layer's are
    others (shifted windows).
    """
    first = sites[0]
    if all(_same_index(first.index, site.index) for site in sites):
        return first
    untold = f"has maps over other tokens in some layers: values.to_tokens({first.full!r}) knows those of each"
    return dataclasses.replace(first, index=None, untold=untold)


def _same_index(a: TokenIndex | None, b: TokenIndex | None) -> bool:
    if a is None or b is None or a is b:
        return a is b
    return a.grids == b.grids and np.array_equal(a.queries, b.queries) and np.array_equal(a.keys, b.keys)


def _of_shapes(full: str, shapes: dict[int, tuple[int, ...]]) -> str:
    """Why values of these layers are not one array."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for layer, shape in shapes.items():
        groups.setdefault(shape, []).append(layer)
    told = ", ".join(f"{list(shape)} in layers={layers}" for shape, layers in groups.items())
    return f"site {full} has several shapes: {told}; record them apart"


def _checked(site: Site, answer: Any, value: Array) -> Array:
    """The answer of a tap in the dtype of the value.

    Raises:
      ValueError: it is None, or of another shape than may be.
    """
    if answer is None:
        raise ValueError(f"a tap gave None for site {site.full}: it has to return the value to go on with")
    answer = jnp.asarray(answer)
    same = answer.ndim == value.ndim and all(
        before == after or axis in site.free
        for axis, before, after in zip(site.axes, value.shape, answer.shape, strict=True)
    )
    if not same:
        free = f" (axes that may change: {', '.join(sorted(site.free))})" if site.free else ""
        raise ValueError(
            f"a tap gave {list(answer.shape)} for site {site.full}, which is {list(value.shape)} "
            f"[{', '.join(site.axes)}]{free}"
        )
    return answer.astype(value.dtype)


@jax.tree_util.register_pytree_node_class
class Recorded(Mapping[str, Array]):
    """What a `record` tap saw: `recorded["probs"]` is `[layers, batch, ...]`.

    A mapping from full names, which also takes the end of one; and a pytree of its arrays, so
    `jax.tree.map(jnp.zeros_like, recorded)` is one of the same sites.

    Attributes:
      arrays: by path and name of the site, layers first.
      layers: which layers these are.
      about: the sites.
      sites: those of each layer, where they differ in more than the number of the layer.
    """

    def __init__(
        self,
        arrays: dict[str, Any],
        layers: dict[str, tuple[int, ...]],
        about: dict[str, Site],
        sites: Mapping[str, Sequence[Site]] | None = None,
    ):
        self.arrays, self.layers, self.about = arrays, layers, about
        self.sites = {full: [about[full]] * len(layers[full]) for full in arrays} if sites is None else sites

    def tree_flatten(self) -> tuple[Any, Any]:
        """For JAX."""
        return tuple(self.arrays.values()), _About(tuple(self.arrays), self.layers, self.about, self.sites)

    @classmethod
    def tree_unflatten(cls, about: Any, arrays: Any) -> Recorded:
        """For JAX."""
        return cls(dict(zip(about.names, arrays, strict=True)), about.layers, about.about, about.sites)

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def names(self, name: str) -> list[str]:
        """The full names that a name, or the end of a path with it, stands for."""
        return [full for full in self.arrays if full == name or full.endswith(f".{name}")]

    def __getitem__(self, name: str) -> Array:
        """Values of a site, `[layers, ...]` in the order of layers.

        Raises:
          KeyError: nothing of that name was recorded, or of several shapes: then longer names tell them apart.
        """
        found = self.names(name)
        if not found:
            raise KeyError(f"nothing was recorded of {name!r}; there is {', '.join(self.arrays) or 'nothing'}")
        if len({self.arrays[full].shape[1:] for full in found}) > 1:
            raise KeyError(f"{name!r} has several shapes here; ask for one of {', '.join(found)}")
        if len(found) == 1:
            return self.arrays[found[0]]
        rows = [
            (layer, number, full, row)
            for number, full in enumerate(found)
            for row, layer in enumerate(self.layers[full])
        ]
        return jnp.stack([self.arrays[full][row] for _, _, full, row in sorted(rows)])

    def to_tokens(self, name: str, queries: Sequence[int] | None = None) -> Array:
        """Maps of a site over tokens, `[layers, batch, heads, queries, keys]`; see `Site.to_tokens`.

        Raises:
          KeyError: nothing of that name was recorded, or something at several paths.
          ValueError: what was recorded are no maps over tokens, or keys depend on the images.
        """
        found = self.names(name)
        if len(found) != 1:
            there = ", ".join(found or self.arrays) or "nothing"
            raise KeyError(f"{name!r} stands for {len(found)} of what was recorded; allowed: {there}")
        both = zip(self.sites[found[0]], self.arrays[found[0]], strict=True)
        return jnp.stack([site.to_tokens(maps, queries) for site, maps in both])

    def at(self, site: Site) -> tuple[Array, Any] | None:
        """What was recorded of a site in its layer, and whether that is there (traced where some layers of a scan are
        not); None for a site of which there is nothing.
        """
        if site.full not in self.arrays:
            return None
        layers, rows = self.layers[site.full], self.arrays[site.full]
        if set(site.span).isdisjoint(layers):
            return None
        if len(site.span) == 1:
            return rows[layers.index(site.span[0])], True
        table = np.full(max(layers) + 2, -1)
        table[list(layers)] = np.arange(len(layers))
        row = jnp.asarray(table)[jnp.minimum(site.layer, len(table) - 1)]
        there = True if set(site.span) <= set(layers) else row >= 0
        return jax.lax.dynamic_index_in_dim(rows, jnp.maximum(row, 0), keepdims=False), there


@dataclasses.dataclass(frozen=True, eq=False)
class _About:
    """The static half of `Recorded`: equal where names and layers are."""

    names: tuple[str, ...]
    layers: dict[str, tuple[int, ...]]
    about: dict[str, Site]
    sites: Mapping[str, Sequence[Site]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _About) and (self.names, self.layers) == (other.names, other.layers)

    def __hash__(self) -> int:
        return hash(self.names)
