"""Taps: what looks into a forward pass, and edits it.

A model emits values at sites: the queries of a mechanism, the result of a block, the hidden units of an MLP. A tap says
which sites it wants (`sites`) and is called with each, `tap(site, value) -> value`. Ready taps are in
`models/core/taps.py`, and are joined by `|`. Works alike in scanned and unrolled models, inside and outside of `jit`.

A site that is asked for and never reached is a ValueError; so is an answer that is None, or of another shape.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from attn import Grid

TOKENS = "batch tokens channels"
"""Axes of tokens."""

SITES = {
    "embedded": "tokens before the first block",
    "block.in": "what a block is given",
    "block.out": "what a block gives",
    "attn.in": "what a mechanism is given",
    "q": "queries",
    "k": "keys",
    "v": "values",
    "routes": "which regions each region is routed to",
    "logits": "logits of a map, scaled, after bias and mask; on a path that keeps maps",
    "probs": "probabilities of a map, before dropout; on the same path",
    "lse": "logsumexp of the logits; to read",
    "heads": "what each head gives, before the output projection",
    "attn.out": "what a mechanism gives",
    "mlp.in": "what an MLP is given",
    "mlp.hidden": "hidden units, after the activation",
    "mlp.out": "what an MLP gives",
    "norm": "tokens after the last norm",
    "pooled": "pooled features",
    "logits.out": "logits of the classes",
}
"""Name of every site -> what it is."""

MAPS = ("logits", "probs")
"""Sites that only a path that keeps maps has."""


@dataclasses.dataclass(frozen=True)
class TokenIndex:
    """Which tokens the rows and columns of maps are for; -1 for what is no token (padding).

    Attributes:
      queries, keys: token numbers, prefix tokens first, `[N]` and `[M]`; with groups (windows, blocks, regions)
        `[G, N]` and `[G, M]`, or `[B, G, M]` where they depend on the example.
      grids: where queries sit, and keys. They may be larger than the grid of the call: a map that windows do not divide
        is padded.
    """

    queries: Int[Array | np.ndarray, "*G N"]
    keys: Int[Array | np.ndarray, "*F M"]
    grids: tuple[Grid, Grid]

    @property
    def tokens(self) -> tuple[int, int]:
        """How many queries there are, and how many keys."""
        return self.grids[0].tokens, self.grids[1].tokens


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a value is.

    Attributes:
      name: one of `SITES`.
      path: names of the modules on the way, `"blocks.attn"`, without numbers of layers.
      layer: its number in the model; traced in a scanned stack.
      span: numbers of all layers that this code is for: one, or those of a scan.
      axes: a word for each axis of the value.
      free: axes whose size an answer may change.
      index: of a map, which tokens it is for; None for what is no map of tokens.
      grid: that of the call.
      grids: where queries of a map sit, and keys: those of the index, and of a recorded site still known without it.
      untold: of a site that was recorded: why it has no index, although one did in the call.
    """

    name: str
    path: str
    layer: Any
    span: tuple[int, ...]
    axes: tuple[str, ...]
    free: frozenset[str] = frozenset()
    index: TokenIndex | None = None
    grid: Grid | None = None
    grids: tuple[Grid, Grid] | None = None
    untold: str = ""

    @property
    def full(self) -> str:
        """Path and name."""
        return f"{self.path}.{self.name}" if self.path else self.name

    def axis(self, word: str) -> int:
        """Which axis of the value that is. ValueError for one that it does not have."""
        if word not in self.axes:
            raise ValueError(f"site {self.full} has no axis {word!r}; it has {', '.join(self.axes)}")
        return self.axes.index(word)

    def along(self, word: str, values: Any) -> Array:
        """A vector of numbers, one for each entry of an axis, in the shape that multiplies the value."""
        axis = self.axis(word)
        values = jnp.asarray(values)
        return values.reshape(*values.shape, *[1] * (len(self.axes) - 1 - axis))

    def to_tokens(self, value: Array, queries: Sequence[int] | None = None) -> Array:
        """A map over windows, blocks or regions as one over tokens, `[batch, heads, queries, keys]`, zero where a pair
        never meets; what several windows say of a pair is summed.

        Args:
          value: of this site, `"logits"` or `"probs"`.
          queries: numbers of the query tokens that are wanted; None for all.

        Raises:
          ValueError: the site is no map of tokens.
        """
        if self.index is None:
            reason = self.untold or f"is no map over tokens; its axes are {', '.join(self.axes)}"
            raise ValueError(f"site {self.full} {reason}")
        return over_tokens(value, self.index, queries)


def over_tokens(value: Array, index: TokenIndex, queries: Sequence[int] | None = None) -> Array:
    """See `Site.to_tokens`; the value is `[B, H, N, M]`, or `[B, G, H, N, M]` with groups."""
    rows = jnp.asarray(index.queries)
    columns = jnp.asarray(index.keys)
    batch = value.shape[0]
    if value.ndim == 4:
        value, rows, columns = value[:, None], rows[None], columns[None]
    groups, heads, _, m = value.shape[1:]
    columns = jnp.broadcast_to(columns, (batch, groups, m))
    count, keys = index.tokens
    if queries is not None:
        # The place of each wanted query among those wanted; others go where nothing is kept.
        places = np.full(count + 1, len(queries))
        places[np.asarray(queries)] = np.arange(len(queries))
        rows = jnp.where(rows < 0, len(queries), jnp.asarray(places)[rows])
        count = len(queries)
    rows = jnp.where(rows < 0, count, rows)
    columns = jnp.where(columns < 0, keys, columns)

    def of_example(value: Array, columns: Array) -> Array:
        target = jnp.zeros((count + 1, keys + 1, heads), value.dtype)
        where = (rows[:, :, None], columns[:, None, :])
        return target.at[where].add(jnp.moveaxis(value, 1, -1))[:count, :keys]

    return jnp.moveaxis(jax.vmap(of_example)(value, columns), -1, 1)


class Tap:
    """What looks at sites. A ready one is a frozen dataclass that is a pytree; `tap(names)(function)` makes one.

    Attributes:
      sites: names of the sites it wants, of `SITES`.
      layers: numbers of the layers it wants, negative ones from the end; None for all.
      at: a pattern of paths (`"*.attn_grid.attn"`); None for all.
    """

    sites: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    at: str | None = None

    def __call__(self, site: Site, value: Array) -> Array:
        """The value to go on with."""
        raise NotImplementedError

    def __or__(self, other: Tap) -> Tap:
        """Both, this one first."""
        return Chain((*parts(self), *parts(other)))


def wants(one: Any, name: str, path: str, span: tuple[int, ...]) -> bool:
    """Whether a tap wants a site, in some layer of those that the code is for."""
    at, layers = getattr(one, "at", None), getattr(one, "layers", None)
    if name not in one.sites or (at is not None and not fnmatch.fnmatchcase(path, at)):
        return False
    return layers is None or not set(span).isdisjoint(layers)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chain(Tap):
    """Several taps, one after the other."""

    taps: tuple[Tap, ...] = ()

    @property
    def sites(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of all."""
        return tuple(dict.fromkeys(name for tap in self.taps for name in tap.sites))


@dataclasses.dataclass(frozen=True)
class FunctionTap(Tap):
    """A function as a tap."""

    function: Callable[[Site, Array], Array]
    sites: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    at: str | None = None

    def __call__(self, site: Site, value: Array) -> Any:
        return in_layers(self.layers, site, self.function(site, value), value)


def tap(
    *sites: str, layers: Iterable[int] | None = None, at: str | None = None
) -> Callable[[Callable[[Site, Array], Array]], FunctionTap]:
    """A decorator that makes a tap of a function `(site, value) -> value`.

    Examples:
      >>> @tap("heads", layers=[2])
      ... def without_first_head(site, value):
      ...     return value.at[:, :, 0].set(0)
    """

    def made(function: Callable[[Site, Array], Array]) -> FunctionTap:
        return FunctionTap(function, sites, None if layers is None else tuple(layers), at)

    return made


def parts(one: Any) -> tuple[Any, ...]:
    """The taps of a chain, or the tap itself.

    Raises:
      ValueError: what is no tap.
    """
    if isinstance(one, Chain):
        return one.taps
    if not callable(one) or not hasattr(one, "sites"):
        raise ValueError(
            f"tap={one!r:.80}: a tap is callable as tap(site, value) and says by `sites` which it wants; "
            'models.tap("probs")(function) makes one'
        )
    return (one,)


def in_layers(layers: tuple[int, ...] | None, site: Site, new: Any, old: Array) -> Any:
    """The new value in these layers, and the old one elsewhere; the layer may be traced."""
    if layers is None or new is old or new is None or set(site.span) <= set(layers):
        return new
    if set(site.span).isdisjoint(layers):
        return old
    if new.shape != old.shape:
        changed = {axis for axis, a, b in zip(site.axes, new.shape, old.shape, strict=False) if a != b}
        if new.ndim != old.ndim or not changed <= site.free:
            return new  # no shape that it could have: the caller of the tap says so
        raise ValueError(f"site {site.full}: another shape in some layers only needs an unrolled model (scan=False)")
    return jnp.where(jnp.isin(site.layer, jnp.asarray(layers)), new.astype(old.dtype), old)
