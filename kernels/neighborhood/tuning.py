"""Tiles of the TPU kernels that were found by measuring, for known problems and those near them.

`tuning/<chip>.json` holds, per problem, the tile that took the fewest cycles by the compiler's own count, and the
command that made the file (`benchmarks/neighborhood_tune.py`). For a problem that is not near any of them the caller
has a model of the cost.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from kernels.neighborhood.pattern import Pattern, make_pattern
from kernels.neighborhood.tiles import group_count

FOLDER = Path(__file__).resolve().parent / "tuning"
FARTHEST = 1.0
"""A problem is near another if lengths, windows and so on differ by factors whose product is at most 2 to this; of
factors of several axes the geometric mean counts."""
MOST_PADDING = 1.1
"""Members of the tiles over members of the map, above which a tile that suits a near problem does not suit this."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a tile is tuned for. One entry of `shape`, `window`, `stride`, `dilation` and `is_causal` for each axis."""

    shape: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    head_dim: int
    dtype: str
    direction: str

    def distance(self, other: Problem) -> float:
        """Sum of the logarithms (to base 2) of what differs, see `FARTHEST`; infinite between kinds of problems."""
        kinds = [(len(one.shape), one.is_causal, one.dtype, one.direction) for one in (self, other)]
        if kinds[0] != kinds[1]:
            return math.inf
        differences = np.abs(np.log2(self._sizes()) - np.log2(other._sizes())).mean(axis=1).sum()
        return float(differences + abs(math.log2(self.head_dim / other.head_dim)))

    def _sizes(self) -> np.ndarray:
        """Lengths of groups, windows, strides and dilations by axis."""
        shape, window, stride, dilation = (
            np.asarray(values, float) for values in (self.shape, self.window, self.stride, self.dilation)
        )
        return np.stack([shape / dilation, window, stride, dilation])

    def takes(self, tile: Sequence[int], residues: int) -> bool:
        """Whether such tiles cut the problem, and into little that does not exist."""
        groups = [-(-length // dilation) for length, dilation in zip(self.shape, self.dilation, strict=True)]
        padded = [-(-length // extent) * extent for length, extent in zip(groups, tile, strict=True)]
        pattern = make_pattern(
            self.shape, self.window, stride=self.stride, dilation=self.dilation, is_causal=self.is_causal
        )
        return math.prod(padded) <= MOST_PADDING * math.prod(groups) and group_count(pattern) % residues == 0


@dataclasses.dataclass(frozen=True)
class Entry:
    """A measured tile: members along each axis, dilation groups of the last axis side by side, and its cycles."""

    problem: Problem
    tile: tuple[int, ...]
    residues: int
    cycles: int


def problem(pattern: Pattern, head_dim: int, dtype: Any, direction: str) -> Problem:
    """The problem of a pattern; `direction` is `"forward"` or `"backward"`."""
    axes = pattern.axes
    return Problem(
        shape=pattern.shape,
        window=pattern.window,
        stride=tuple(axis.stride for axis in axes),
        dilation=tuple(axis.dilation for axis in axes),
        is_causal=tuple(axis.is_causal for axis in axes),
        head_dim=head_dim,
        dtype=jnp.dtype(dtype).name,
        direction=direction,
    )


def lookup(chip: str, wanted: Problem) -> tuple[tuple[int, ...], int] | None:
    """`(tile, residues)` of the nearest entry for a chip that the problem can take; None if none is near.

    `chip` is a name such as `"v5e"`; one without a file has no entries.
    """
    near = [(wanted.distance(entry.problem), entry) for entry in entries(chip)]
    near = [
        (distance, entry)
        for distance, entry in near
        if distance == 0 or (distance <= FARTHEST and wanted.takes(entry.tile, entry.residues))
    ]
    if not near:
        return None
    _, nearest = min(near, key=lambda pair: pair[0])
    return nearest.tile, nearest.residues


@functools.cache
def entries(chip: str) -> tuple[Entry, ...]:
    """All entries for a chip."""
    path = FOLDER / f"{chip}.json"
    if not path.exists():
        return ()
    return tuple(_entry(one) for one in json.loads(path.read_text())["entries"])


def _entry(record: dict[str, Any]) -> Entry:
    def frozen(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    fields = {field.name: frozen(record[field.name]) for field in dataclasses.fields(Problem)}
    return Entry(Problem(**fields), tuple(record["tile"]), record["residues"], record["cycles"])
