"""Weight names of DaViT: timm's, those of the official files, and those of Florence-2's image encoder.

https://github.com/dingmyu/davit; https://huggingface.co/microsoft/Florence-2-base.
"""

import re
from collections.abc import Collection, Iterator, Mapping

import numpy as np

from models.families.davit.model import DualAttentionTransformer
from models.weights.family import Dialect
from models.weights.table import Flat, Row, Table, conv, linear, norm

KINDS = {"window": "spatial_block", "channel": "channel_block"}
"""timm's names of layers, by mechanism, where they have names."""


def davit_table(model: DualAttentionTransformer) -> Table:
    """timm's names, which count pairs and then the layers of a pair, where ours count layers."""
    return Table(
        conv("stem.conv", "patch_embed.conv"),
        norm("stem.norm", "patch_embed.norm"),
        norm("stages.{}.downsample.norm"),
        conv("stages.{}.downsample.conv"),
        *(
            _block(f"stages.{stage}.blocks.{place}", f"stages.{stage}.blocks.{layer}")
            for stage, holder in enumerate(model.stages)
            for layer, place in enumerate(places(model, holder.depth))
        ),
        norm("norm_pre" if model.options.norm_first else "head.norm", "norm"),
        linear("head.fc", "head"),
    )


def places(model: DualAttentionTransformer, depth: int) -> list[str]:
    """What timm calls each of the layers of a stage: `1.0`, or `1.spatial_block`."""
    members = len(model.options.members)
    names = [_name(model, member) for member in range(members)]
    return [f"{layer // members}.{names[layer % members]}" for layer in range(depth)]


def _name(model: DualAttentionTransformer, member: int) -> str:
    # Another mechanism keeps the name of the layer's place.
    place = list(KINDS.values())[member % len(KINDS)]
    return KINDS.get(model.options.members[member], place) if model.options.named_blocks else str(member)


def _block(theirs: str, ours: str) -> Iterator[Row]:
    for name in ("cpe1.proj", "cpe2.proj"):
        yield from conv(f"{theirs}.{name}", f"{ours}.{name}")
    for name in ("norm1", "norm2"):
        yield from norm(f"{theirs}.{name}", f"{ours}.{name}")
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        yield from linear(f"{theirs}.{name}", f"{ours}.{name}")


# --- dialects ---------------------------------------------------------------------------------------------------------


def _renamed(name: str, rules: Mapping[str, str]) -> str:
    for pattern, replacement in rules.items():
        name = re.sub(pattern, replacement, name)
    return name


def _stages(name: str, model: DualAttentionTransformer) -> str:
    """Downsampling of stage 0 is the stem; layers by what the model's table calls them."""
    name = _renamed(name, {r"\.downsample\.proj\.": ".downsample.conv.", r"^stages\.0\.downsample\.": "stem."})
    match = re.match(r"(stages\.\d+\.blocks\.\d+\.)(?:(\d+)|(spatial|channel)_block)\.(.*)", name)
    if not match:
        return name
    member = int(match[2]) if match[2] else list(KINDS.values()).index(f"{match[3]}_block")
    # A layer that the model does not have is reported by the name in the file.
    return f"{match[1]}{_name(model, member)}.{match[4]}" if member < len(model.options.members) else name


_OFFICIAL = {
    r"^patch_embeds\.(\d+)\.": r"stages.\1.downsample.",
    r"^main_blocks\.(\d+)\.": r"stages.\1.blocks.",
    r"\.cpe\.0\.": ".cpe1.",
    r"\.cpe\.1\.": ".cpe2.",
    r"^head\.": "head.fc.",
    r"^norms\.": "head.norm.",
}
# With the wrappers of the original files, or without them as in transformers.
_FLORENCE = {
    r"^convs\.(\d+)\.": r"stages.\1.downsample.",
    r"^blocks\.(\d+)\.": r"stages.\1.blocks.",
    r"\.conv(\d)\.(fn\.dw\.)?": r".cpe\1.proj.",
    r"\.(window|channel)_attn\.norm\.": ".norm1.",
    r"\.(window|channel)_attn\.(fn\.)?": ".attn.",
    r"\.ffn\.norm\.": ".norm2.",
    r"\.ffn\.(fn\.net\.)?": ".mlp.",
}
_TOWER = re.compile(r"(.*\.)?vision_tower\.(?=(convs|blocks)\.)")


def _official(arrays: Flat, model: DualAttentionTransformer) -> tuple[Flat, list[str]]:
    return {_stages(_renamed(name, _OFFICIAL), model): array for name, array in arrays.items()}, []


def _florence(arrays: Flat, model: DualAttentionTransformer) -> tuple[Flat, list[str]]:
    """The image encoder of the whole model; it has neither a classifier nor the norm before one."""
    tower = {_TOWER.sub("", name): array for name, array in arrays.items() if _TOWER.match(name)}
    outside = len(arrays) - len(tower)
    notes = [f"{outside} entries outside vision_tower are left out"] if outside else []
    renamed = {_stages(_renamed(name, _FLORENCE), model): array for name, array in tower.items()}
    place = "norm_pre" if model.options.norm_first else "head.norm"
    if f"{place}.weight" not in renamed:
        shape = model.norm.scale.shape
        renamed |= {f"{place}.weight": np.ones(shape, np.float32), f"{place}.bias": np.zeros(shape, np.float32)}
        notes.append("the norm before the head starts anew: the file has none")
    return renamed, notes


def _is_florence(names: Collection[str]) -> bool:
    return any(_TOWER.match(name) for name in names)


def _is_official(names: Collection[str]) -> bool:
    return any(name.startswith(("patch_embeds.", "main_blocks.")) for name in names)


DAVIT_DIALECTS = (
    Dialect("Florence-2", _is_florence, _florence),
    Dialect("dingmyu/davit", _is_official, _official),
)
