"""Ready taps. Each is one line to use, is joined with others by `|`, and may be an argument of a jitted function."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from models.core.tap import Site, Tap, in_layers
from models.core.watch import Recorded


def _static(default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


def _numbers(layers: int | Iterable[int] | None) -> tuple[int, ...] | None:
    if layers is None:
        return None
    return (layers,) if isinstance(layers, int) else tuple(int(layer) for layer in layers)


# --- record -----------------------------------------------------------------------------------------------------------


class Record(Tap):
    """Keeps what it sees; after the call `tap.values` has it."""

    is_record = True

    def __init__(self, sites: tuple[str, ...], layers: tuple[int, ...] | None, at: str | None):
        self.sites, self.layers, self.at = sites, layers, at
        self._values: Recorded | None = None

    @property
    def values(self) -> Recorded:
        """What was recorded in the last call. ValueError before any."""
        if self._values is None:
            raise ValueError("nothing is recorded yet: call a model with this tap first")
        return self._values

    def __getitem__(self, name: str) -> Array:
        """`values[name]`."""
        return self.values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def keys(self) -> Iterable[str]:
        """Full names of the sites that were recorded."""
        return self.values.keys()

    def items(self) -> Iterable[tuple[str, Array]]:
        """Those with their values."""
        return self.values.items()

    def __call__(self, site: Site, value: Array) -> Array:
        return value

    def kept(self, site: Site, value: Array) -> Array | None:
        """What is kept of a value: all of it; None for nothing."""
        return value


jax.tree_util.register_pytree_node(
    Record, lambda tap: ((), (tap.sites, tap.layers, tap.at)), lambda about, _: Record(*about)
)


def record(*sites: str, layers: int | Iterable[int] | None = None, at: str | None = None) -> Record:
    """Values of sites: after `model(images, tap=tap)`, `tap["probs"]` is `[layers, batch, ...]`.

    Examples:
      >>> tap = record("heads", layers=[0, 2])

    Args:
      sites: names of `models.core.tap.SITES`.
      layers: numbers, from the end where they are negative; None for all. Memory is that of these layers.
      at: a pattern of paths.
    """
    return Record(sites, _numbers(layers), at)


# --- edits ------------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _AblateHeads(Tap):
    heads: tuple[int, ...] = _static()
    layers: tuple[int, ...] | None = _static(None)
    at: str | None = _static(None)
    sites: tuple[str, ...] = _static(("heads",))

    def __call__(self, site: Site, value: Array) -> Array:
        count = value.shape[site.axis("heads")]
        if wrong := [head for head in self.heads if not 0 <= head < count]:
            raise ValueError(f"site {site.full} has heads 0 to {count - 1}; there is no head {wrong[0]}")
        kept = ~np.isin(np.arange(count), self.heads)
        return in_layers(self.layers, site, value * site.along("heads", kept).astype(value.dtype), value)


def ablate_heads(
    heads: int | Iterable[int], *, layers: int | Iterable[int] | None = None, at: str | None = None
) -> Tap:
    """What these heads give is zero."""
    return _AblateHeads(_numbers(heads) or (), _numbers(layers), at)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _ScaleLogits(Tap):
    factor: Any
    layers: tuple[int, ...] | None = _static(None)
    at: str | None = _static(None)
    sites: tuple[str, ...] = _static(("logits",))

    def __call__(self, site: Site, value: Array) -> Array:
        factor = jnp.asarray(self.factor)
        if factor.ndim > 1:
            raise ValueError(f"factor {list(factor.shape)}: must be a number, or one for each head")
        scaled = value * (site.along("heads", factor) if factor.ndim else factor)
        # What a mask has taken stays where it is: a factor below 1 must not bring it back.
        kept = value > 0.5 * jnp.finfo(value.dtype).min
        return in_layers(self.layers, site, jnp.where(kept, scaled, value), value)


def scale_logits(
    factor: float | Float[Array, " H"], *, layers: int | Iterable[int] | None = None, at: str | None = None
) -> Tap:
    """Logits times a factor, one for all heads or one for each: an inverse temperature, with a gradient."""
    return _ScaleLogits(factor, _numbers(layers), at)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Recorded(Tap):
    """What takes recorded values, or one array for every place."""

    values: Any
    sites: tuple[str, ...] = _static()
    layers: tuple[int, ...] | None = _static(None)
    at: str | None = _static(None)

    def __call__(self, site: Site, value: Array) -> Array:
        if not isinstance(self.values, Recorded):
            return in_layers(self.layers, site, self.joined(site, value, self.values), value)
        found = self.values.at(site)
        if found is None:
            return value
        own, there = found
        new = in_layers(self.layers, site, self.joined(site, value, own), value)
        if there is True:
            return new
        if new.shape != value.shape:
            raise ValueError(
                f"site {site.full}: another shape in some layers only needs an unrolled model (scan=False)"
            )
        return jnp.where(there, new, value)

    def joined(self, site: Site, value: Array, own: Array) -> Array:
        """What becomes of a value."""
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Replace(_Recorded):
    def joined(self, site: Site, value: Array, own: Array) -> Array:
        return own


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Add(_Recorded):
    def joined(self, site: Site, value: Array, own: Array) -> Array:
        return value + own


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Append(_Recorded):
    def joined(self, site: Site, value: Array, own: Array) -> Array:
        return jnp.concatenate([value, own.astype(value.dtype)], site.axis("keys"))


def replace(
    values: Recorded | Array, *sites: str, layers: int | Iterable[int] | None = None, at: str | None = None
) -> Tap:
    """Other values in the place of those that are there: recorded ones, or one array for every place.

    Args:
      values: what `record` gave, for another image or as it was changed; or an array of the shape of the site.
      sites: which of them; all that were recorded unless given.
    """
    return _Replace(values, _sites(values, sites), _numbers(layers), at)


def add(values: Recorded | Array, *sites: str, layers: int | Iterable[int] | None = None, at: str | None = None) -> Tap:
    """Values added to those that are there. With zeros this changes nothing and gives gradients with respect to all
    maps: `jax.grad(lambda eps: loss(model(images, tap=add(eps))))(jax.tree.map(jnp.zeros_like, recorded))`.
    """
    return _Add(values, _sites(values, sites), _numbers(layers), at)


def append_keys(values: Recorded, *, layers: int | Iterable[int] | None = None, at: str | None = None) -> Tap:
    """Keys and values of another image beside those of this one, in the same window or neighborhood.

    Args:
      values: what `record("k", "v")` gave for the other image.
    """
    return _Append(values, ("k", "v"), _numbers(layers), at)


def _sites(values: Any, sites: Sequence[str]) -> tuple[str, ...]:
    if sites:
        return tuple(sites)
    if isinstance(values, Recorded):
        return tuple(dict.fromkeys(site.name for site in values.about.values()))
    raise ValueError('values are one array: say which site they are for, as in replace(values, "heads")')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _DropKeys(Tap):
    tokens: tuple[int, ...] = _static()
    layers: tuple[int, ...] | None = _static(None)
    at: str | None = _static(None)
    sites: tuple[str, ...] = _static(("logits",))

    def __call__(self, site: Site, value: Array) -> Array:
        if site.index is None:
            raise ValueError(f"site {site.full} is no map over tokens; its axes are {', '.join(site.axes)}")
        keys = jnp.asarray(site.index.keys)
        dropped = jnp.isin(keys, jnp.asarray(self.tokens))
        if keys.ndim > 1:  # groups: [G, M] or [B, G, M] to [.., G, heads, queries, M]
            dropped = dropped[..., None, None, :]
        return in_layers(self.layers, site, jnp.where(dropped, jnp.finfo(value.dtype).min, value), value)


def drop_keys(tokens: int | Iterable[int], *, layers: int | Iterable[int] | None = None, at: str | None = None) -> Tap:
    """No query looks at these tokens (numbers, prefix tokens first): a sink that is removed."""
    return _DropKeys(_numbers(tokens) or (), _numbers(layers), at)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Steer(Tap):
    vector: Any
    layers: tuple[int, ...] | None = _static(None)
    at: str | None = _static(None)
    sites: tuple[str, ...] = _static(("block.out",))

    def __call__(self, site: Site, value: Array) -> Array:
        return in_layers(self.layers, site, value + jnp.asarray(self.vector, value.dtype), value)


def steer(layer: int | Iterable[int], vector: Float[Array, "*S"]) -> Tap:
    """A vector `[C]` (or anything that broadcasts to the tokens) added to what a block gives."""
    return _Steer(vector, _numbers(layer), None)
