"""Transforms that add fields or give them a fixed shape, so that records of any kind can be put in one batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from data.transform import Example, Transform


@dataclass(frozen=True)
class View(Transform):
    """Copies image `source` to a new image field `name`; what follows acts on both alike, or on one with `on=`."""

    name: str
    source: str = "image"

    @override
    def __call__(self, example: Example, rng: np.random.Generator) -> None:
        if example.kinds.get(self.source) != "image":
            raise ValueError(f"'view' copies an image field; {self.source!r} is none of {sorted(example.kinds)}")
        example.values[self.name] = example.values[self.source]
        example.kinds[self.name] = "image"

    @override
    def kinds_after(self, kinds: dict[str, str]) -> dict[str, str]:
        return {**kinds, self.name: "image"}


@dataclass(frozen=True)
class PadRows(Transform):
    """Cuts or fills boxes and points with zeros to `count` rows; `<field>_valid` float32 [count] is 1 for real rows."""

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
        padded = [name for name, kind in kinds.items() if kind in ("boxes", "points")]
        return {**kinds, **{f"{name}_valid": "label" for name in padded}}


@dataclass(frozen=True)
class Tokenize(Transform):
    """Turns text into int32 [length]: its UTF-8 bytes plus one, then zeros."""

    length: int

    @override
    def __call__(self, example: Example, rng: np.random.Generator) -> None:
        for name in self.fields(example, "text"):
            value = example.values[name]
            if isinstance(value, str):
                tokens = np.frombuffer(value.encode()[: self.length], np.uint8).astype(np.int32) + 1
                example.values[name] = np.pad(tokens, (0, self.length - len(tokens)))
