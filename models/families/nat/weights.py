"""Weight names of the official NAT, DiNAT, DiNAT_s and isotropic models.

https://github.com/SHI-Labs/Neighborhood-Attention-Transformer, classification.
"""

from collections.abc import Iterator

import numpy as np

from models.families.nat.isotropic import IsotropicTransformer
from models.families.nat.model import NeighborhoodTransformer
from models.layers.downsample import ConvDownsample
from models.layers.stem import ConvStem
from models.weights.table import Row, Table, constant, conv, copy, linear, norm


def nat_table(model: NeighborhoodTransformer) -> Table:
    """Names for NAT and DiNAT, or for DiNAT_s; theirs have the downsampling at the end of a level, ours at the start
    of the next stage.
    """
    levels = "levels" if isinstance(model.patch_embed, ConvStem) else "layers"
    return Table(
        _stem(model),
        _block(f"{levels}.{{}}.blocks.{{}}", "stages.{}.blocks.{}"),
        *(_downsampling(f"{levels}.{stage - 1}", model, stage) for stage in range(1, len(model.stages))),
        norm("norm"),
        linear("head"),
    )


def isotropic_table(model: IsotropicTransformer) -> Table:
    """Names for NAT-iso, DiNAT-iso and ViT-rpb, whose layers keep an index into the bias table besides."""
    return Table(
        conv("patch_embed.proj", "patch_embed"),
        norm("patch_embed.norm", "norm_pre"),
        _block("layers.{}", "blocks.{}"),
        *(_bias_index(layer, model) for layer in range(model.depth) if model.options.attention == "dense"),
        norm("norm"),
        linear("head"),
    )


def _stem(model: NeighborhoodTransformer) -> Iterator[Row]:
    if isinstance(model.patch_embed, ConvStem):
        yield from conv("patch_embed.proj.0", "patch_embed.conv1")
        yield from conv("patch_embed.proj.1", "patch_embed.conv2")
    else:
        yield from conv("patch_embed.proj")
    yield from norm("patch_embed.norm")


def _block(theirs: str, ours: str) -> Iterator[Row]:
    for name in ("norm1", "norm2"):
        yield from norm(f"{theirs}.{name}", f"{ours}.{name}")
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        yield from linear(f"{theirs}.{name}", f"{ours}.{name}")
    yield from copy(f"{theirs}.attn.rpb", f"{ours}.attn.relative_bias")
    for number in (1, 2):
        yield from copy(f"{theirs}.gamma{number}", f"{ours}.ls{number}.gamma")


def _downsampling(theirs: str, model: NeighborhoodTransformer, stage: int) -> Iterator[Row]:
    ours = f"stages.{stage}.downsample"
    if isinstance(model.stages[stage].downsample, ConvDownsample):
        yield from conv(f"{theirs}.downsample.reduction", f"{ours}.conv")
    else:
        yield from linear(f"{theirs}.downsample.reduction", f"{ours}.reduction")
    yield from norm(f"{theirs}.downsample.norm", f"{ours}.norm")


def _bias_index(layer: int, model: IsotropicTransformer) -> Iterator[Row]:
    """Where the table has the bias of query i and key j: displacement `j - i`, rows before columns."""
    rows, columns = np.mgrid[: model.grid.shape[0], : model.grid.shape[1]].reshape(2, -1)
    down, right = (axis[None] - axis[:, None] + axis.max() for axis in (rows, columns))
    index = down * (2 * model.grid.shape[1] - 1) + right
    yield from constant(f"layers.{layer}.attn.relative_position_index", index.astype(np.int64))
