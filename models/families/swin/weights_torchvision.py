"""torchvision's names for the weights of a Swin (`swin_t` and its kind).

https://github.com/pytorch/vision, torchvision/models/swin_transformer.py.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from models.families.swin.model import SwinTransformer
from models.families.swin.weights import bias_index, relative_bias, windows
from models.weights.family import Dialect
from models.weights.table import Flat, Row, Table, constant, conv, linear, norm


def torchvision_table(model: SwinTransformer) -> Table:
    """Names and layouts of SwinTransformer: patches, stages and mergings are numbered through."""
    return Table(
        conv("features.0.0", "patch_embed.proj"),
        norm("features.0.2", "patch_embed.norm"),
        *(_stage(stage, window, model) for stage, window in enumerate(windows(model))),
        *(_merging(stage) for stage in range(1, len(model.stages))),
        norm("norm"),
        linear("head"),
    )


def _stage(stage: int, window: Sequence[int] | None, model: SwinTransformer) -> Iterator[Row]:
    theirs, ours = f"features.{2 * stage + 1}.{{}}", f"stages.{stage}.blocks.{{}}"
    for name in ("norm1", "norm2"):
        yield from norm(f"{theirs}.{name}", f"{ours}.{name}")
    for there, here in (
        ("attn.qkv", "attn.qkv"),
        ("attn.proj", "attn.proj"),
        ("mlp.0", "mlp.fc1"),
        ("mlp.3", "mlp.fc2"),
    ):
        yield from linear(f"{theirs}.{there}", f"{ours}.{here}")
    if window:
        yield from relative_bias(f"{theirs}.attn.relative_position_bias_table", f"{ours}.attn.relative_bias", window)
        for block in range(model.options.depths[stage]):
            index = bias_index(window).reshape(-1)
            yield from constant(f"{theirs.format(block)}.attn.relative_position_index", index)


def _merging(stage: int) -> Iterator[Row]:
    yield from norm(f"features.{2 * stage}.norm", f"stages.{stage}.downsample.norm")
    yield from linear(f"features.{2 * stage}.reduction", f"stages.{stage}.downsample.reduction")


_LAYER = re.compile(r"features\.1\.0\.attn\.relative_position_bias_table")


def _unchanged(arrays: Flat, model: Any) -> tuple[Flat, list[str]]:
    return arrays, []


def _recognize(names: Collection[str]) -> bool:
    return any(_LAYER.fullmatch(name) for name in names)


TORCHVISION = Dialect("torchvision", _recognize, _unchanged, layout="torchvision")
