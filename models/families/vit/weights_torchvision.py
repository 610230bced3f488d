"""torchvision's names for the weights of a ViT (`vit_b_16` and its kind).

https://github.com/pytorch/vision, torchvision/models/vision_transformer.py.
"""

import re
from collections.abc import Collection, Iterator
from typing import Any

from models.families.vit.weights_huggingface import kind_of_model, refuse_unlike
from models.hosts.isotropic import VisionTransformer
from models.weights.family import Dialect
from models.weights.table import Flat, Row, Table, conv, copy, custom, linear, norm


def torchvision_table(model: VisionTransformer) -> Table:
    """Names and layouts of VisionTransformer.

    Raises:
      ValueError: torchvision has no such model.
    """
    refuse_unlike(model, "torchvision")
    if kind_of_model(model) != "vit":
        raise ValueError(f"torchvision has no ViT of the kind {kind_of_model(model)!r}; it has the plain one")
    layer, ours = "encoder.layers.encoder_layer_{}", "blocks.{}"
    return Table(
        copy("class_token", "cls_token"),
        conv("conv_proj", "patch_embed"),
        copy("encoder.pos_embedding", "pos_embed"),
        norm(f"{layer}.ln_1", f"{ours}.norm1"),
        _inputs(f"{layer}.self_attention.in_proj", f"{ours}.attn.qkv"),
        linear(f"{layer}.self_attention.out_proj", f"{ours}.attn.proj"),
        norm(f"{layer}.ln_2", f"{ours}.norm2"),
        linear(f"{layer}.mlp.0", f"{ours}.mlp.fc1"),
        linear(f"{layer}.mlp.3", f"{ours}.mlp.fc2"),
        norm("encoder.ln", "norm"),
        linear("heads.pre_logits", "pre_logits"),
        linear("heads.head", "head"),
    )


def _inputs(theirs: str, ours: str) -> Iterator[Row]:
    """PyTorch's attention has no module for its three projections."""
    turn = lambda arrays, *sizes: [arrays[0].T]  # noqa: E731
    yield from custom(f"{theirs}_weight", f"{ours}.kernel", turn, turn)
    yield from copy(f"{theirs}_bias", f"{ours}.bias")


_OLD = {"mlp.linear_1.": "mlp.0.", "mlp.linear_2.": "mlp.3."}
_LAYER = re.compile(r"encoder\.layers\.encoder_layer_\d+\.ln_1\.weight")


def _rewrite(arrays: Flat, model: Any) -> tuple[Flat, list[str]]:
    """Layers of an MLP had other names before torchvision 0.15."""
    found = {}
    for name, array in arrays.items():
        for old, new in _OLD.items():
            name = name.replace(old, new)
        found[name] = array
    return found, []


def _recognize(names: Collection[str]) -> bool:
    return any(_LAYER.fullmatch(name) for name in names)


TORCHVISION = Dialect("torchvision", _recognize, _rewrite, layout="torchvision")
