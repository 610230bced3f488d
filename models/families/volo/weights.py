"""Weight names of VOLO, the same in timm and in the official code (https://github.com/sail-sg/volo)."""

from collections.abc import Iterator

from models.families.volo.model import Volo
from models.weights.table import Row, Table, batch_norm, conv, copy, linear, norm


def volo_table(model: Volo) -> Table:
    """Theirs number stages and the layers between them in one list, and the layers of the stem in another."""
    stages, between = network_places(model)
    return Table(
        *(conv(f"patch_embed.conv.{3 * i}", f"patch_embed.conv{i + 1}") for i in range(3)),
        *(batch_norm(f"patch_embed.conv.{3 * i + 1}", f"patch_embed.norm{i + 1}") for i in range(3)),
        conv("patch_embed.proj"),
        copy("pos_embed"),
        copy("cls_token"),
        *(conv(f"network.{place}.proj", f"stages.{stage}.downsample") for stage, place in between.items()),
        *(_block(f"network.{place}.{{}}", f"stages.{stage}.blocks.{{}}") for stage, place in enumerate(stages)),
        _block("post_network.{}", "class_blocks.{}"),
        norm("norm"),
        linear("head"),
        linear("aux_head"),
    )


def network_places(model: Volo) -> tuple[list[int], dict[int, int]]:
    """Places in their list: of every stage, and of the downsampling before a stage."""
    stages, between, place = list[int](), dict[int, int](), 0
    for number, stage in enumerate(model.stages):
        if stage.downsample is not None:
            between[number] = place
            place += 1
        stages.append(place)
        place += 1
    return stages, between


def _block(theirs: str, ours: str) -> Iterator[Row]:
    """A block with any of the three kinds of attention."""
    for name in ("norm1", "norm2"):
        yield from norm(f"{theirs}.{name}", f"{ours}.{name}")
    for name in ("attn.qkv", "attn.q", "attn.kv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        yield from linear(f"{theirs}.{name}", f"{ours}.{name}")
    yield from linear(f"{theirs}.attn.v", f"{ours}.attn.value")
    yield from linear(f"{theirs}.attn.attn", f"{ours}.attn.weights")
