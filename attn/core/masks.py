"""Masks: which keys a query may look at, said by a boolean array, by a rule, or by several of these together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Integer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """A query may look at a key that every part of the mask allows. Masks are joined by `&`.

    Queries are the last ones of the keys: query i of N stands at place `i + M - N` among M keys, unless `offset` says
    another place of the first one (keys that are cached in a longer array).

    Attributes:
      allowed: True where a query may look; `[N, M]`, or `[B, H, N, M]` with axes of 1 for what is the same everywhere.
      offset: place of the first query among the keys, for `is_causal` and `window`.
      lengths: keys of each example that there are, `[B]`; those behind are not seen.
      is_causal: no key behind the query.
      window: keys that are seen, the query's own place and `window - 1` before it; without `is_causal` as many behind.
    """

    allowed: Bool[Array, "*S"] | None = None
    lengths: Integer[Array, "*B"] | None = None
    offset: Integer[Array, "*O"] | None = None
    is_causal: bool = dataclasses.field(default=False, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})

    def __and__(self, other: Mask) -> Mask:
        """What both allow."""
        other = as_mask(other)
        both = [mask for mask in (self.allowed, other.allowed) if mask is not None]
        ends = [length for length in (self.lengths, other.lengths) if length is not None]
        offsets = [offset for offset in (self.offset, other.offset) if offset is not None]
        if len(offsets) == 2:
            raise ValueError("two masks with an offset each cannot be joined: queries have one place")
        windows = [window for window in (self.window, other.window) if window is not None]
        return Mask(
            allowed=functools.reduce(lambda a, b: _broadcast(a) & _broadcast(b), both) if both else None,
            lengths=functools.reduce(jnp.minimum, ends) if ends else None,
            offset=offsets[0] if offsets else None,
            is_causal=self.is_causal or other.is_causal,
            window=min(windows, default=None),
        )

    __rand__ = __and__
    __array_ufunc__ = None  # NumPy leaves `array & mask` to this class

    @property
    def kinds(self) -> tuple[str, ...]:
        """What it is made of, of `"boolean"`, `"lengths"`, `"causal"`, `"window"`."""
        parts = {
            "boolean": self.allowed is not None,
            "lengths": self.lengths is not None,
            "causal": self.is_causal,
            "window": self.window is not None,
        }
        return tuple(name for name, there in parts.items() if there)

    def dense(self, batch: int, heads: int, queries: int, keys: int) -> Bool[Array, "#B #H #N M"]:
        """The mask over all pairs.

        Raises:
          ValueError: it is for others.
        """
        parts = []
        if self.allowed is not None:
            allowed = _broadcast(self.allowed)
            sizes = (batch, heads, queries, keys)
            if any(n not in (1, size) for n, size in zip(allowed.shape, sizes, strict=True)):
                raise ValueError(
                    f"mask {list(self.allowed.shape)}: must be [queries, keys], which is {[queries, keys]} here, or "
                    f"[batch, heads, queries, keys], {list(sizes)}; axes of 1 are repeated"
                )
            parts.append(allowed)
        if self.lengths is not None:
            if self.lengths.shape != (batch,):
                raise ValueError(f"lengths {list(self.lengths.shape)}: must be one for each example, [{batch}]")
            parts.append((jnp.arange(keys) < self.lengths[:, None])[:, None, None])
        if self.is_causal or self.window is not None:
            first = keys - queries if self.offset is None else self.offset
            behind = jnp.arange(keys) - (jnp.arange(queries)[:, None] + first)
            if self.is_causal:
                parts.append((behind <= 0)[None, None])
            if self.window is not None:
                parts.append((jnp.abs(behind) < self.window)[None, None])
        whole = parts[0] if parts else jnp.ones((1, 1, 1, 1), bool)
        for part in parts[1:]:
            whole = whole & part
        # A NumPy array stays one: which of its rows are empty is known before there is a program.
        broadcast: Any = np.broadcast_to if isinstance(whole, np.ndarray) else jnp.broadcast_to
        return broadcast(whole, (*whole.shape[:3], keys))


def causal() -> Mask:
    """No key behind the query."""
    return Mask(is_causal=True)


def lengths(counts: Integer[Array, " B"] | Sequence[int]) -> Mask:
    """The first keys of each example, as many as `counts` says."""
    counts = jnp.asarray(counts)
    if not jnp.issubdtype(counts.dtype, jnp.integer) or counts.ndim != 1:
        raise ValueError(f"lengths {counts.dtype}{list(counts.shape)}: must be integers, one for each example")
    return Mask(lengths=counts)


def sliding_window(size: int) -> Mask:
    """The query's own place and `size - 1` neighbours on each side (before it, together with `causal()`)."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"window={size!r} of a mask; allowed: an integer of at least 1")
    return Mask(window=size)


def as_mask(mask: Any) -> Mask:
    """A mask from what a user says: a `Mask`, or a boolean array.

    Raises:
      ValueError: an array of another type, which may mean something else, or of other than two or four axes.
    """
    if isinstance(mask, Mask):
        return mask
    if not hasattr(mask, "dtype"):
        mask = jnp.asarray(mask)
    if mask.dtype != bool:
        raise ValueError(
            f"mask {mask.dtype}{list(mask.shape)}: must be boolean, True where a query may look; what is added to "
            "logits (0 and -inf) is a bias"
        )
    if mask.ndim not in (2, 4):
        raise ValueError(
            f"mask {list(mask.shape)}: must be [queries, keys] or [batch, heads, queries, keys]; give the axis that is "
            "missing as one of 1"
        )
    return Mask(allowed=mask)


def _broadcast(mask: Bool[Array, "*S"]) -> Bool[Array, "B H N M"]:
    return mask if mask.ndim == 4 else mask[None, None]
