"""Window attention by what computes neighborhood attention: blocks and grids are cases of it (docs/neighborhood.md).

A shift cuts the windows at the border of the map. There is neither a torus nor a mask then: the middle, the sides and
the corners of the map are blocks of their own sizes, each a part for itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attn.core.explain import Choice
from attn.core.operator import Implementation
from attn.neighborhood.api import NEIGHBORHOOD
from attn.neighborhood.api import Settings as NeighborhoodSettings
from kernels.neighborhood.pattern import Pattern, make_pattern

Sides = tuple[int, int]

LARGEST = 256
"""Tokens of a window, above which tiles are faster on a CPU (docs/kernels_window.md)."""


@dataclasses.dataclass(frozen=True)
class PartsImplementation(Implementation):
    """An implementation in parts.

    Attributes:
      on: each part by what is best on this platform.
      using: each part by this implementation of neighborhood attention.
    """

    on: str = ""
    using: str | None = None

    def load(self) -> Any:
        """What a module is for others."""
        return _parts(self.on, self.using)


@functools.cache
def _parts(on: str, using: str | None) -> Parts:
    return Parts(on, using)


class Part(NamedTuple):
    """Blocks of one size.

    Attributes:
      rows, columns: where the part is on the map.
    """

    rows: slice
    columns: slice
    window: Sides


class Parts:
    """See `PartsImplementation`; the functions are those of a module."""

    def __init__(self, on: str, using: str | None):
        self.on, self.using = on, using

    def unprofitable(self, q: Any, k: Any, v: Any, bias: Any = None, **settings: Any) -> str | None:
        """Dense products in each window are faster."""
        if self.using is not None:
            count = settings["window"][0] * settings["window"][1]
            return f"windows of {count} tokens; above {LARGEST} tiles are faster" if count <= LARGEST else None
        choices = [choice for _, _, choice in self._chosen(q, k, v, bias, **settings)]
        if any(NEIGHBORHOOD.named(choice.implementation).platforms or choice.fallback_from for choice in choices):
            return None
        first = next(iter(choices[0].refused.items()))
        return f"no kernel of neighborhood attention is faster ({first[0]}: {first[1]})"

    def refuse(self, q: Any, k: Any, v: Any, bias: Any = None, **settings: Any) -> str | None:
        """A kernel refuses a part."""
        for part, _, choice in self._chosen(q, k, v, bias, **settings):
            if choice.fallback_from:
                return f"{choice.fallback_from} on blocks of {part.window}: {choice.refused[choice.fallback_from]}"
        return None

    def forward(
        self,
        q: Float[Array, "B Y X H D"],
        k: Float[Array, "B Y X K D"],
        v: Float[Array, "B Y X K E"],
        bias: Float[Array, "H V U"] | None,
        **settings: Any,
    ) -> tuple[Array, Array]:
        """Output and logsumexp."""

        def run(part: Part, module: Any, pattern: Pattern, *arrays: Any) -> tuple[Array, Array]:
            queries, keys, values = arrays
            own = _of_middle(bias, settings["window"], part.window)
            return module.forward(queries, keys, values, own, None, None, pattern=pattern, scale=settings["scale"])

        out, lse = self._over_parts(run, (q, k, v), (q, k, v, bias), settings)
        return out, lse[..., 0]

    def backward(
        self,
        q: Array,
        k: Array,
        v: Array,
        bias: Array | None,
        out: Array,
        lse: Array,
        d_out: Array,
        d_lse: Array | None,
        **settings: Any,
    ) -> tuple[Array, Array, Array, Array | None]:
        """Gradients of the four arrays."""
        of_bias: list[Array] = []

        def run(part: Part, module: Any, pattern: Pattern, *arrays: Any) -> tuple[Array, ...]:
            queries, keys, values, part_out, part_lse, d_part, *d_part_lse = arrays
            own = _of_middle(bias, settings["window"], part.window)
            found = module.backward(
                queries,
                keys,
                values,
                own,
                None,
                None,
                part_out,
                part_lse[..., 0],
                d_part,
                d_part_lse[0][..., 0] if d_part_lse else None,
                pattern=pattern,
                scale=settings["scale"],
            )
            if own is not None:
                around = [(whole - size,) * 2 for whole, size in zip(settings["window"], part.window, strict=True)]
                of_bias.append(jnp.pad(found[3], ((0, 0), *around)))
            return found[:3]

        arrays = [q, k, v, out, lse[..., None], d_out] + ([] if d_lse is None else [d_lse[..., None]])
        d_q, d_k, d_v = self._over_parts(run, arrays, (q, k, v, bias), settings)
        return d_q, d_k, d_v, sum(of_bias[1:], start=of_bias[0]) if of_bias else None

    def _chosen(
        self, q: Any, k: Any, v: Any, bias: Any, *, window: Sides, shift: Sides, grid: bool, scale: float
    ) -> Iterator[tuple[Part, Pattern, Choice]]:
        """What computes each part."""
        for part in _cut(q.shape[1:3], window, shift):
            sides = (part.rows.stop - part.rows.start, part.columns.stop - part.columns.start)
            pattern = _pattern(sides, part.window, grid)
            inputs = [jax.ShapeDtypeStruct((x.shape[0], *sides, *x.shape[3:]), x.dtype) for x in (q, k, v)]
            table = None
            if bias is not None:
                extents = (bias.shape[0], *(2 * size - 1 for size in part.window))
                table = jax.ShapeDtypeStruct(extents, bias.dtype)
            if self.using is not None:
                choice = Choice(self.using, {}, None)
            else:
                arrays = (*inputs, table, None, None)
                choice = NEIGHBORHOOD.choose(self.on, arrays, NeighborhoodSettings(pattern, scale))
            yield part, pattern, choice

    def _over_parts(
        self, run: Callable[..., Sequence[Array]], arrays: Sequence[Array], inputs: Sequence[Any], settings: Any
    ) -> list[Array]:
        """What `run(part, module, pattern, *arrays of the part)` gives, put together."""
        chosen = list(self._chosen(*inputs, **settings))
        if len(chosen) == 1:
            part, pattern, choice = chosen[0]
            found = run(part, NEIGHBORHOOD.named(choice.implementation).load(), pattern, *arrays)
            return [x if x.ndim == 5 else x[..., None] for x in found]
        # Cut with features in one axis: a TPU stores the last two in tiles, and heads would fill a part of each.
        flat = [x.reshape(*x.shape[:3], -1) for x in arrays]
        rows: dict[int, list[list[Array]]] = {}
        heads: list[int] = []
        for part, pattern, choice in chosen:
            cut = [
                x[:, part.rows, part.columns].reshape(x.shape[0], *_sides(part), *array.shape[3:])
                for x, array in zip(flat, arrays, strict=True)
            ]
            found = run(part, NEIGHBORHOOD.named(choice.implementation).load(), pattern, *cut)
            heads = [x.shape[3] for x in found]
            rows.setdefault(part.rows.start, []).append([x.reshape(*x.shape[:3], -1) for x in found])
        down = [[jnp.concatenate(side, 2) for side in zip(*row, strict=True)] for row in rows.values()]
        whole = [jnp.concatenate(side, 1) for side in zip(*down, strict=True)]
        return [x.reshape(*x.shape[:3], count, -1) for x, count in zip(whole, heads, strict=True)]


def _pattern(sides: Sides, window: Sides, grid: bool) -> Pattern:
    """Windows as neighborhoods."""
    if grid:
        return make_pattern(
            sides, window, dilation=tuple(side // size for side, size in zip(sides, window, strict=True))
        )
    return make_pattern(sides, window, stride=window)


def _sides(part: Part) -> Sides:
    return part.rows.stop - part.rows.start, part.columns.stop - part.columns.start


def _cut(shape: Sequence[int], window: Sides, shift: Sides) -> Iterator[Part]:
    """The parts of a map, row by row."""
    for rows, height in _stretches(shape[0], window[0], shift[0]):
        for columns, width in _stretches(shape[1], window[1], shift[1]):
            yield Part(rows, columns, (height, width))


def _stretches(length: int, window: int, shift: int) -> Iterator[tuple[slice, int]]:
    """What blocks that begin `shift` later leave of an axis: a part of a window, whole ones, the rest of the first."""
    before, after = shift % window, -shift % window
    for begin, end, size in ((0, before, before), (before, length - after, window), (length - after, length, after)):
        if begin < end:
            yield slice(begin, end), size


def _of_middle(bias: Float[Array, "H V U"] | None, window: Sides, smaller: Sides) -> Float[Array, "H v u"] | None:
    """What of a table of biases by relative position windows of a smaller size need."""
    if bias is None:
        return None
    rows, columns = (slice(whole - part, whole + part - 1) for whole, part in zip(window, smaller, strict=True))
    return bias[:, rows, columns]
