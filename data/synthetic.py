"""A set made of formulas: no files, any size, and classes that a model can learn to tell apart."""

import ast
import re

import numpy as np
from typing_extensions import override

from data.kinds import FieldSpec
from data.source import Info, Record, Source
from data.split import select
from naming import unknown

DEFAULTS = {"classes": 10, "examples": 1000, "size": 32}
_STAND_INS = {
    "imagenet2012": "synthetic:classes=1000,examples=1281167,size=256",
    "cifar10": "synthetic:classes=10,examples=50000,size=32",
    "cifar100": "synthetic:classes=100,examples=50000,size=32",
}
STAND_IN = "synthetic:classes=...,examples=...,size=..."
"""How a set is written that stands for another one."""


def stand_in(name: str) -> str | None:
    """A set with as many classes and examples as a well-known one; None for others. It is all that a plan takes."""
    return _STAND_INS.get(re.split("[:/]", name)[0])


def open_synthetic(argument: str, split: str, directory: str | None = None) -> Source:
    """`synthetic:classes=10,examples=1000,size=32`: splits `train` (examples) and `test` (a quarter as many)."""
    del directory
    options = dict(DEFAULTS)
    for item in filter(None, argument.split(",")):
        key, _, value = item.partition("=")
        if key.strip() not in DEFAULTS:
            raise ValueError(unknown("option of the synthetic set", key.strip(), DEFAULTS))
        try:
            options[key.strip()] = int(ast.literal_eval(value.strip()))
        except (ValueError, SyntaxError, TypeError):
            options[key.strip()] = 0
        if options[key.strip()] < 1:
            raise ValueError(f"option {key.strip()!r} of the synthetic set must be an integer above 0, got {value!r}")
    sizes = {"train": options["examples"], "test": max(options["examples"] // 4, 1)}
    return select(split, sizes, lambda name: Synthetic(name, sizes, options["classes"], options["size"]))


class Synthetic(Source):
    """Gratings whose direction, frequency and colour tell the class, at random phase, with noise."""

    def __init__(self, split: str, sizes: dict[str, int], classes: int, size: int):
        self._seed = sorted(sizes).index(split)
        self._size = size
        self.info = Info(
            name="synthetic",
            split=split,
            fields={"image": FieldSpec("image", (size, size, 3), "uint8"), "label": FieldSpec("label", (), "int64")},
            num_examples=sizes[split],
            num_classes=classes,
            class_names=tuple(f"grating {index}" for index in range(classes)),
            splits=sizes,
        )

    def __len__(self) -> int:
        return self.info.num_examples

    def __getitem__(self, index: int) -> Record:
        classes = self.info.num_classes or 1
        label = index % classes
        rng = np.random.Generator(np.random.Philox(key=np.array([self._seed, index], np.uint64)))
        style = np.random.Generator(np.random.Philox(key=np.array([2, label], np.uint64)))
        angle, cycles = np.pi * label / classes, style.uniform(2, 5)
        colour = style.uniform(0.3, 1, 3).astype(np.float32)
        axis = np.arange(self._size, dtype=np.float32) * np.float32(2 * np.pi * cycles / self._size)
        phase = rng.uniform(0, 2 * np.pi)
        wave = np.cos(axis[None] * np.float32(np.cos(angle)) + axis[:, None] * np.float32(np.sin(angle)) + phase)
        pixels = 128 + 80 * wave[..., None] * colour + 12 * rng.standard_normal((self._size, self._size, 1), np.float32)
        return {"index": index, "image": np.clip(pixels, 0, 255).astype(np.uint8), "label": label}

    @override
    def describe(self, index: int) -> str:
        return f"example {index} of synthetic {self.info.split}"
