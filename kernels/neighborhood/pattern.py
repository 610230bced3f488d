"""The pattern of neighborhood attention, in integers: which keys a query sees, and which queries see a key.

Everything about neighborhood attention derives from `interval`: oracle, kernels, masks, counts, simulator, pictures.

An axis of length L with dilation d is d groups that do not see each other: token i is member `i // d` of group `i % d`.
Inside a group of n members, queries come in runs of `stride` that share the window of one leader (Generalized
Neighborhood Attention, arXiv:2504.16922); a window that would leave the map slides inwards and keeps its size
(Neighborhood Attention, arXiv:2204.07143, eq. 1). An even window has one more member on the left. Several axes: the
Cartesian product of their sets.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

PerAxis = int | Sequence[int]
Bounds = tuple[Int[np.ndarray, "*P"], Int[np.ndarray, "*P"]]


def interval(position: Any, length: Any, window: int, stride: int, is_causal: bool) -> Bounds:
    """The members `[first, end)` of its group that the query at `position` of a group of `length` sees.

    Integers or arrays of them; `window <= length`, `1 <= stride <= window`. Not causal: always `window` members.
    Causal: the window ends at the query, and begins where the last query of its run has it.
    """
    position, length = np.asarray(position), np.asarray(length)
    run = position // stride * stride
    if is_causal:
        leader = np.minimum(run + stride - 1, length - 1)
        return np.asarray(np.maximum(leader - (window - 1), 0)), np.asarray(position + 1)
    leader = np.minimum(run + stride // 2, length - 1)
    first = np.clip(leader - window // 2, 0, length - window)
    return np.asarray(first), np.asarray(first + window)


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a map and the pattern along it.

    >>> axis = Axis(length=8, window=3, dilation=2)
    >>> [axis.neighbors(i).tolist() for i in range(4)]
    [[0, 2, 4], [1, 3, 5], [0, 2, 4], [1, 3, 5]]
    """

    length: int
    window: int
    stride: int = 1
    dilation: int = 1
    is_causal: bool = False

    def group_length(self, group: Any) -> Any:
        """Members of the group of tokens `group, group + dilation, ...`; groups differ by one at most."""
        return self.length // self.dilation + (np.asarray(group) < self.length % self.dilation)

    def interval(self, index: Any) -> Bounds:
        """`[first, end)` of the query with token index `index`, as members of its group."""
        index = np.asarray(index)
        return interval(
            index // self.dilation,
            self.group_length(index % self.dilation),
            self.window,
            self.stride,
            self.is_causal,
        )

    def neighbors(self, index: int) -> Int[np.ndarray, " K"]:
        """Token indices of the keys of a query, in order."""
        first, end = self.interval(index)
        return index % self.dilation + self.dilation * np.arange(int(first), int(end))

    def reverse_interval(self, index: Any) -> Bounds:
        """`[first, end)` of the queries that see the key with token index `index`, as members of its group.

        Both ends of `interval` grow with the position, so these queries are neighbors of each other: they begin with
        the first whose end lies behind the key and stop before the first that begins behind it.
        """
        index = np.asarray(index)
        members, group = index // self.dilation, index % self.dilation
        first, end = np.empty_like(members), np.empty_like(members)
        for residue in range(self.dilation):
            length = int(self.group_length(residue))
            starts, ends = interval(np.arange(length), length, self.window, self.stride, self.is_causal)
            here = group == residue
            first[here] = np.searchsorted(ends, members[here], side="right")
            end[here] = np.searchsorted(starts, members[here], side="right")
        return first, end

    def reverse(self, index: int) -> Int[np.ndarray, " Q"]:
        """Token indices of the queries that see a key, in order."""
        first, end = self.reverse_interval(np.asarray([index]))
        return index % self.dilation + self.dilation * np.arange(first[0], end[0])

    @functools.cached_property
    def mask(self) -> Bool[np.ndarray, "L L"]:
        """`mask[i, j]`: query i sees key j."""
        tokens = np.arange(self.length)
        first, end = self.interval(tokens)
        member, group = tokens // self.dilation, tokens % self.dilation
        inside = (member[None] >= first[:, None]) & (member[None] < end[:, None])
        return inside & (group[:, None] == group[None])

    @functools.cached_property
    def pairs(self) -> int:
        """Number of pairs of a query and a key that it sees."""
        first, end = self.interval(np.arange(self.length))
        return int((end - first).sum())


@dataclasses.dataclass(frozen=True)
class Pattern:
    """The pattern on a map of one to three axes (any number, in fact). Made by `make_pattern`."""

    axes: tuple[Axis, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""
        return tuple(axis.length for axis in self.axes)

    @property
    def window(self) -> tuple[int, ...]:
        """Windows of the axes."""
        return tuple(axis.window for axis in self.axes)

    @property
    def tokens(self) -> int:
        """Number of tokens of the map."""
        return math.prod(self.shape)

    @property
    def pairs(self) -> int:
        """Number of pairs of a query and a key that it sees."""
        return math.prod(axis.pairs for axis in self.axes)

    @property
    def is_dense(self) -> bool:
        """Whether every query sees every key."""
        return self.pairs == self.tokens**2

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """Extents of a table of relative positions: `key - query` in members, plus `window - 1`, is its index."""
        return tuple(2 * axis.window - 1 for axis in self.axes)

    def mask(self) -> Bool[np.ndarray, "N N"]:
        """`mask[i, j]` over tokens in row-major order. N x N: for small maps, and for what compares itself with us."""
        mask = np.ones((1, 1), bool)
        for axis in self.axes:
            mask = np.kron(mask, axis.mask)
        return mask

    def neighbors(self, query: Sequence[int]) -> Int[np.ndarray, " K"]:
        """Flat indices of the keys of the query at these coordinates, in order."""
        sets = [axis.neighbors(index) for axis, index in zip(self.axes, query, strict=True)]
        return self._flat(sets)

    def reverse(self, key: Sequence[int]) -> Int[np.ndarray, " Q"]:
        """Flat indices of the queries that see the key at these coordinates, in order."""
        return self._flat([axis.reverse(index) for axis, index in zip(self.axes, key, strict=True)])

    def _flat(self, sets: Sequence[np.ndarray]) -> np.ndarray:
        return np.ravel_multi_index(np.meshgrid(*sets, indexing="ij"), self.shape).ravel()

    def flops(self, head_dim: int, head_dim_v: int | None = None, *, heads: int = 1, extra: int = 0) -> int:
        """FLOPs of the two products of the forward pass (2 for a multiplication with its addition), one example."""
        width = head_dim + (head_dim if head_dim_v is None else head_dim_v)
        return 2 * heads * (self.pairs + self.tokens * extra) * width

    def bytes(self, head_dim: int, head_dim_v: int | None = None, *, heads: int = 1, itemsize: int = 2) -> int:
        """The least bytes that the forward pass moves, one example: q, k, v read once, the output written once."""
        return 2 * heads * self.tokens * (head_dim + (head_dim if head_dim_v is None else head_dim_v)) * itemsize


def make_pattern(
    shape: Sequence[int],
    window: PerAxis,
    *,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: bool | Sequence[bool] = False,
    on_oversize: str = "error",
) -> Pattern:
    """The pattern on a map of `shape`; a scalar holds for every axis.

    Args:
      on_oversize: for a window times dilation longer than its axis. `"error"`; or `"clamp"`: the dilation is lowered
        to what the window leaves room for, then the window (and with it the stride) to the axis, with a warning.

    Raises:
      ValueError: for what is not legal, with the legal choices.
    """
    shape = tuple(int(length) for length in shape)
    if not shape or min(shape) < 1:
        raise ValueError(f"neighborhood attention needs a map of one or more axes of at least one token, got {shape}")
    if on_oversize not in ("error", "clamp"):
        raise ValueError(f"on_oversize={on_oversize!r}; allowed: 'error', 'clamp'")
    windows = per_axis("window", window, len(shape), 1)
    strides = per_axis("stride", stride, len(shape), 1)
    dilations = per_axis("dilation", dilation, len(shape), 1)
    causal = per_axis("is_causal", is_causal, len(shape), None)
    axes = []
    for number, (n, w, s, d, causal_here) in enumerate(zip(shape, windows, strides, dilations, causal, strict=True)):
        where = f"axis {number} of the map {shape}"
        if s > w:
            raise ValueError(f"stride {s} is larger than window {w} on {where}; allowed: 1 to {w}")
        if w * d > n:
            if on_oversize == "error":
                choices = [f"window up to {n // d} with dilation {d}"] if d <= n else []
                choices += [f"dilation up to {n // w} with window {w}"] if w <= n else []
                raise ValueError(
                    f"window {w} times dilation {d} is longer than {where}; allowed: "
                    + ", or ".join([*choices, "on_oversize='clamp'"])
                )
            fitting = max(1, n // w)
            smaller = min(w, n)
            warnings.warn(
                f"window {w} with dilation {d} does not fit {where}: using window {smaller} with dilation {fitting}",
                stacklevel=2,
            )
            w, d, s = smaller, fitting, min(s, smaller)
        axes.append(Axis(n, w, s, d, causal_here))
    return Pattern(tuple(axes))


def per_axis(name: str, value: Any, rank: int, least: int | None) -> tuple[Any, ...]:
    """One entry for each axis. `least` is the smallest legal integer; None: booleans.

    Raises:
      ValueError: for another number of entries, or an entry that is not legal.
    """
    kind = "True or False" if least is None else f"an integer of at least {least}"
    entries: tuple[Any, ...] = tuple(value) if isinstance(value, (tuple, list)) else (value,) * rank
    if len(entries) != rank:
        raise ValueError(f"{name}={value!r} has {len(entries)} entries for {rank} axes; allowed: one, or {rank}")
    for entry in entries:
        if least is None:
            legal = isinstance(entry, (bool, np.bool_))
        else:
            legal = isinstance(entry, (int, np.integer)) and not isinstance(entry, bool) and bool(entry >= least)
        if not legal:
            raise ValueError(f"{name}={value!r}; allowed: {kind}, or a tuple of {rank} of them")
    return tuple(bool(entry) if least is None else int(entry) for entry in entries)
