"""Transforms that add fields or give them a fixed shape, so that records of any kind can be put in one batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from typing_extensions import override

from data.transform import Example, Transform
from naming import unknown


@dataclass(frozen=True)
class View(Transform):
    """Copies the field `source`, of any kind, to a new one `name`; what follows acts on both, or on one with `on=`."""

    acts: ClassVar[tuple[str, ...] | None] = ()

    name: str
    source: str = "image"

    @override
    def __call__(self, example: Example, rng: np.random.Generator) -> None:
        example.values[self.name] = example.values[self.source]
        example.kinds = self.kinds_after(example.kinds)

    @override
    def kinds_after(self, kinds: dict[str, str]) -> dict[str, str]:
        if self.source not in kinds:
            raise ValueError(unknown("field that 'view' copies:", self.source, kinds))
        return {**kinds, self.name: kinds[self.source]}


@dataclass(frozen=True)
class PadRows(Transform):
    """Cuts or fills boxes and points with zeros to `count` rows; `<field>_valid` float32 [count] is 1 for real rows."""

    acts: ClassVar[tuple[str, ...] | None] = ("boxes", "points")

    count: int

    @override
    def __call__(self, example: Example, rng: np.random.Generator) -> None:
        for name in self.fields(example, "boxes", "points"):
            rows = np.asarray(example.values[name])[: self.count]
            padded = np.zeros((self.count, *rows.shape[1:]), np.float32)
            padded[: len(rows)] = rows
            example.values[name] = padded
            example.values[f"{name}_valid"] = (np.arange(self.count) < len(rows)).astype(np.float32)
            example.kinds[f"{name}_valid"] = "label"

    @override
    def kinds_after(self, kinds: dict[str, str]) -> dict[str, str]:
        padded = [name for name, kind in kinds.items() if kind in ("boxes", "points") and self.acts_on(name)]
        return {**kinds, **{f"{name}_valid": "label" for name in padded}}


@dataclass(frozen=True)
class Tokenize(Transform):
    """Turns text into tokens, int32 [length]: its UTF-8 bytes plus one, then zeros."""

    acts: ClassVar[tuple[str, ...] | None] = ("text",)

    length: int

    @override
    def __call__(self, example: Example, rng: np.random.Generator) -> None:
        for name in self.fields(example, "text"):
            value = example.values[name]
            if isinstance(value, str):
                tokens = np.frombuffer(value.encode()[: self.length], np.uint8).astype(np.int32) + 1
                example.values[name] = np.pad(tokens, (0, self.length - len(tokens)))
        example.kinds = self.kinds_after(example.kinds)

    @override
    def kinds_after(self, kinds: dict[str, str]) -> dict[str, str]:
        return {name: "tokens" if kind == "text" and self.acts_on(name) else kind for name, kind in kinds.items()}
