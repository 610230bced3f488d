"""Weight names of timm's ByobNet with halo or bottleneck attention, and of its halo attention alone."""

from collections.abc import Iterator

from models.families.halonet.model import HaloNet
from models.layers.conv_norm import ConvNorm
from models.weights.table import Row, Table, batch_norm, conv, copy, linear, pointwise


def halonet_table(model: HaloNet) -> Table:
    """Names of timm's ByobNet: the first block of a stage is block 0, the next the first of our stack."""
    stem = model.patch_embed
    # A stem of one convolution without a pool is that layer itself there.
    whole = len(stem.convs) == 1 and stem.pool is None
    rows: list[Row] = []
    for number, convolution in enumerate(stem.convs):
        theirs, ours = "stem" if whole else f"stem.conv{number + 1}", f"patch_embed.convs.{number}"
        rows += _normed(theirs, ours) if isinstance(convolution, ConvNorm) else conv(theirs, ours)
    for number, stage in enumerate(model.stages):
        rows += _block(f"stages.{number}.0", f"stages.{number}.first")
        for layer in range(stage.depth - 1):
            rows += _block(f"stages.{number}.{layer + 1}", f"stages.{number}.blocks.{layer}")
    return Table(iter(rows), _pointwise_normed("final_conv", "final_conv"), linear("head.fc", "head"))


def _block(theirs: str, ours: str) -> Iterator[Row]:
    for name in ("shortcut", "shortcut.conv"):
        yield from _pointwise_normed(f"{theirs}.{name}", f"{ours}.{name}")
    yield from _pointwise_normed(f"{theirs}.conv1_1x1", f"{ours}.conv1")
    yield from _normed(f"{theirs}.conv2_kxk", f"{ours}.conv2")
    yield from _normed(f"{theirs}.conv2b_kxk", f"{ours}.conv2b")
    yield from attention_rows(f"{theirs}.self_attn.", f"{ours}.attn.")
    yield from batch_norm(f"{theirs}.post_attn", f"{ours}.post_norm")
    for name, gate in (("attn", "gate"), ("attn_last", "gate_last")):
        yield from conv(f"{theirs}.{name}.fc1", f"{ours}.{gate}.fc1")
        yield from conv(f"{theirs}.{name}.fc2", f"{ours}.{gate}.fc2")
        yield from conv(f"{theirs}.{name}.conv", f"{ours}.{gate}")
    yield from _pointwise_normed(f"{theirs}.conv3_1x1", f"{ours}.conv3")


def _normed(theirs: str, ours: str) -> Iterator[Row]:
    yield from conv(f"{theirs}.conv", f"{ours}.conv")
    yield from batch_norm(f"{theirs}.bn", f"{ours}.norm")


def _pointwise_normed(theirs: str, ours: str) -> Iterator[Row]:
    yield from pointwise(f"{theirs}.conv", f"{ours}.conv")
    yield from batch_norm(f"{theirs}.bn", f"{ours}.norm")


def attention_rows(theirs: str, ours: str) -> Iterator[Row]:
    """Prefixes end with a dot, or are empty. Keys and values of a head stand side by side in both."""
    for name in ("q", "kv", "qkv"):
        yield from pointwise(f"{theirs}{name}", f"{ours}{name}")
    for name in ("height_rel", "width_rel"):
        yield from copy(f"{theirs}pos_embed.{name}", f"{ours}{name}")
