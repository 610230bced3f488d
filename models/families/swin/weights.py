"""Weight names of Swin: timm's, and those of the official files and older timm.

https://github.com/microsoft/Swin-Transformer, models/swin_transformer.py.
"""

import math
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from models.attention.window import WindowAttention
from models.families.swin.model import SwinTransformer
from models.weights.family import Dialect
from models.weights.table import Arrays, Flat, Row, Table, conv, custom, linear, norm


def swin_table(model: SwinTransformer) -> Table:
    """timm's names."""
    return Table(
        conv("patch_embed.proj"),
        norm("patch_embed.norm"),
        *(norm(f"layers.{{}}.blocks.{{}}.{name}", f"stages.{{}}.blocks.{{}}.{name}") for name in ("norm1", "norm2")),
        *(
            linear(f"layers.{{}}.blocks.{{}}.{name}", f"stages.{{}}.blocks.{{}}.{name}")
            for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        ),
        *(_bias(stage, window) for stage, window in enumerate(windows(model)) if window),
        norm("layers.{}.downsample.norm", "stages.{}.downsample.norm"),
        linear("layers.{}.downsample.reduction", "stages.{}.downsample.reduction"),
        norm("norm"),
        linear("head.fc", "head"),
    )


def relative_bias(theirs: str, ours: str, window: Sequence[int]) -> Iterator[Row]:
    """A bias table of Swin, `[(2 rows - 1) (2 columns - 1), H]` by query - key, as ours `[H, ...]` by key - query.

    A file for another window has a square one: it does not say its sides.
    """
    extents = tuple(2 * side - 1 for side in window)

    def to_ours(arrays: Arrays, sizes: Sequence[int]) -> Arrays:
        (table,) = arrays
        entries = table.shape[0]
        sides = extents if entries == math.prod(extents) else (math.isqrt(entries),) * 2
        if table.ndim != 2 or math.prod(sides) != entries:
            raise ValueError(f"shape {table.shape} is not a table for windows of {tuple(window)}, nor for square ones")
        return [np.flip(table.reshape(*sides, -1), (0, 1)).transpose(2, 0, 1)]

    def to_theirs(arrays: Arrays) -> Arrays:
        (table,) = arrays
        return [np.flip(table, (1, 2)).transpose(1, 2, 0).reshape(-1, table.shape[0])]

    yield from custom(theirs, ours, to_ours, to_theirs)


def bias_index(window: Sequence[int]) -> np.ndarray:
    """Where a bias table of Swin has the entry of query and key, `[N, N]` for the N places of a window: a buffer that
    several projects keep beside the table.
    """
    rows, columns = np.mgrid[: window[0], : window[1]].reshape(2, -1)
    down, right = (axis[:, None] - axis[None] + axis.max() for axis in (rows, columns))
    return (down * (2 * window[1] - 1) + right).astype(np.int64)


def _bias(stage: int, window: Sequence[int]) -> Iterator[Row]:
    theirs = f"layers.{stage}.blocks.{{}}.attn.relative_position_bias_table"
    yield from relative_bias(theirs, f"stages.{stage}.blocks.{{}}.attn.relative_bias", window)


def windows(model: SwinTransformer) -> Iterator[Sequence[int] | None]:
    """Windows of each stage; None for another mechanism."""
    for stage in model.stages:
        first = getattr(stage.blocks, f"[0::{stage.blocks.group}]" if stage.blocks.scan else "0")
        yield first.attn.window if isinstance(getattr(first, "attn", None), WindowAttention) else None


_BUFFER = re.compile(r".*\.(relative_position_index|attn_mask)")
_CLASSIFIER = re.compile(r"head\.(weight|bias)")


def _official(arrays: Flat, model: Any) -> tuple[Flat, list[str]]:
    """Buffers left out; merging at the end of a layer, where timm's today has it at the start of the next."""
    at_the_end = any(name.startswith("layers.0.downsample.") for name in arrays)

    def renamed(name: str) -> str:
        if at_the_end:
            name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample.", name)
        return re.sub(r"^head\.(?=weight$|bias$)", "head.fc.", name)

    return {renamed(name): array for name, array in arrays.items() if not _BUFFER.fullmatch(name)}, []


def _is_official(names: Collection[str]) -> bool:
    if any(name.startswith("features.") for name in names):
        return False  # torchvision's, whose classifier has the same name
    return any(
        _BUFFER.fullmatch(name) or _CLASSIFIER.fullmatch(name) or name.startswith("layers.0.downsample.")
        for name in names
    )


SWIN_DIALECTS = (Dialect("microsoft/Swin-Transformer", _is_official, _official),)
