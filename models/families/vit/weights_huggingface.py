"""Hugging Face's names for the weights of a ViT: its ViT, DeiT, DINOv2 (with and without registers), and the image
towers of SigLIP and CLIP.

Which of them a model is follows from its options. A model with classes has the names of a classifier (`vit.` before the
body's), one without those of the body alone, as `save_pretrained` writes them.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np

from models.hosts.isotropic import VisionTransformer
from models.weights.family import Dialect
from models.weights.table import Arrays, Flat, Row, Table, constant, conv, copy, custom, linear, norm

_WITHOUT: dict[str, Any] = {
    "block": "pre_norm",
    "attention": "dense",
    "position": "learned",
    "final_norm": True,
    "proj_bias": True,
    "qk_norm": False,
    "scale_attention_norm": False,
    "scale_mlp_norm": False,
}
"""What all of these models have."""


def huggingface_table(model: VisionTransformer) -> Table:
    """Names and layouts of the class that the model is.

    Raises:
      ValueError: Hugging Face has no such model.
    """
    refuse_unlike(model, "Hugging Face")
    return _KINDS[kind_of_model(model)](model)


def refuse_unlike(model: VisionTransformer, whose: str) -> None:
    """ValueError for a model with parts that neither Hugging Face nor torchvision has."""
    for option, value in _WITHOUT.items():
        if getattr(model.options, option) != value:
            raise ValueError(f"{whose} has no ViT with {option}={getattr(model.options, option)!r}")


def kind_of_model(model: VisionTransformer) -> str:
    """`"clip"`, `"siglip"`, `"dinov2"`, `"deit"` or `"vit"`."""
    o = model.options
    if o.pool == "map":
        return "siglip"
    if o.pre_norm:
        return "clip"
    if o.layer_scale is not None or o.registers:
        return "dinov2"
    return "deit" if o.distillation_token else "vit"


# --- ViT and DeiT -----------------------------------------------------------------------------------------------------


def _vit(model: VisionTransformer) -> Table:
    body = _body(model)
    layer, ours = f"{body}encoder.layer.{{}}", "blocks.{}"
    heads = ("cls_classifier", "distillation_classifier") if model.dist_token is not None else ("classifier", "")
    return Table(
        copy(f"{body}embeddings.cls_token", "cls_token"),
        copy(f"{body}embeddings.distillation_token", "dist_token"),
        copy(f"{body}embeddings.position_embeddings", "pos_embed"),
        conv(f"{body}embeddings.patch_embeddings.projection", "patch_embed"),
        _attention(f"{layer}.attention", ours),
        norm(f"{layer}.layernorm_before", f"{ours}.norm1"),
        norm(f"{layer}.layernorm_after", f"{ours}.norm2"),
        linear(f"{layer}.intermediate.dense", f"{ours}.mlp.fc1"),
        linear(f"{layer}.output.dense", f"{ours}.mlp.fc2"),
        norm(f"{body}layernorm", "norm"),
        linear(f"{body}pooler.dense", "pre_logits"),
        linear(heads[0], "head"),
        linear(heads[1], "head_dist") if heads[1] else (),
    )


def _attention(theirs: str, ours: str) -> Iterator[Row]:
    yield from linear([f"{theirs}.attention.{name}" for name in ("query", "key", "value")], f"{ours}.attn.qkv")
    yield from linear(f"{theirs}.output.dense", f"{ours}.attn.proj")


def _body(model: VisionTransformer) -> str:
    """What stands before the names of everything but the classifier."""
    if not model.num_classes:
        return ""
    kind = kind_of_model(model)
    return "dinov2_with_registers." if kind == "dinov2" and model.options.registers else f"{kind}."


# --- DINOv2 -----------------------------------------------------------------------------------------------------------


def _dinov2(model: VisionTransformer) -> Table:
    body = _body(model)
    layer, ours = f"{body}encoder.layer.{{}}", "blocks.{}"
    gated = model.options.mlp != "mlp"
    mlp = ("weights_in", "weights_out") if gated else ("fc1", "fc2")
    return Table(
        copy(f"{body}embeddings.cls_token", "cls_token"),
        constant(f"{body}embeddings.mask_token", np.zeros((1, model.width), np.float32)),
        copy(f"{body}embeddings.register_tokens", "reg_token"),
        _positions(f"{body}embeddings.position_embeddings", model),
        conv(f"{body}embeddings.patch_embeddings.projection", "patch_embed"),
        _attention(f"{layer}.attention", ours),
        *(norm(f"{layer}.norm{number}", f"{ours}.norm{number}") for number in (1, 2)),
        *(copy(f"{layer}.layer_scale{number}.lambda1", f"{ours}.ls{number}.gamma") for number in (1, 2)),
        *(linear(f"{layer}.mlp.{name}", f"{ours}.mlp.fc{number}") for number, name in enumerate(mlp, 1)),
        norm(f"{body}layernorm", "norm"),
        _unlike("classifier", "head", "DINOv2", "reads the class token beside the mean of the patches"),
    )


def _positions(theirs: str, model: VisionTransformer) -> Iterator[Row]:
    """Theirs have a row for the class token and none for registers; ours none, or one for each.

    Rows of registers are zeros as they are read, and have to be zeros to be written: theirs are nowhere.
    """
    registers, rows = model.options.registers, model.prefix_positions

    def to_ours(arrays: Arrays, sizes: Sequence[int]) -> Arrays:
        (table,) = arrays
        if rows and registers and table.shape[1] != model.grid.tokens:
            zeros = np.zeros_like(table, shape=(table.shape[0], registers, table.shape[2]))
            return [np.concatenate([table[:, :1], zeros, table[:, 1:]], axis=1)]
        # Without rows of ours a row that is not zero is added to the class token where weights are fitted.
        return [table[:, 1:] if not rows and not table[:, :1].any() else table]

    def to_theirs(arrays: Arrays) -> Arrays:
        (table,) = arrays
        if not rows:
            return [np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)]
        if table[:, 1 : 1 + registers].any():
            raise ValueError(
                "Hugging Face's DINOv2 has no positions of registers, and this model has learned some; export a model "
                "with prefix_positions=False that has loaded these weights"
            )
        return [np.concatenate([table[:, :1], table[:, 1 + registers :]], axis=1)]

    yield from custom(theirs, "pos_embed", to_ours, to_theirs)


def _unlike(theirs: str, ours: str, whose: str, what: str) -> Iterator[Row]:
    """A classifier that is read, so that it starts anew, but means something else there and is not written."""

    def refuse(arrays: Arrays) -> Arrays:
        raise ValueError(f"{whose} of Hugging Face has another classifier ({what}): export a model with num_classes=0")

    yield from custom(f"{theirs}.weight", f"{ours}.kernel", lambda arrays, sizes: [arrays[0].T], refuse)
    yield from custom(f"{theirs}.bias", f"{ours}.bias", lambda arrays, sizes: [arrays[0]], refuse)


# --- SigLIP and CLIP --------------------------------------------------------------------------------------------------


def _tower(model: VisionTransformer, body: str) -> Iterator[Row]:
    """What both towers have in common."""
    layer, ours = f"{body}encoder.layers.{{}}", "blocks.{}"
    yield from conv(f"{body}embeddings.patch_embedding", "patch_embed")
    yield from _reshaped(f"{body}embeddings.position_embedding.weight", "pos_embed", 2)
    yield from linear([f"{layer}.self_attn.{name}_proj" for name in "qkv"], f"{ours}.attn.qkv")
    yield from linear(f"{layer}.self_attn.out_proj", f"{ours}.attn.proj")
    for number in (1, 2):
        yield from norm(f"{layer}.layer_norm{number}", f"{ours}.norm{number}")
        yield from linear(f"{layer}.mlp.fc{number}", f"{ours}.mlp.fc{number}")
    yield from norm(f"{body}post_layernorm", "norm")


def _siglip(model: VisionTransformer) -> Table:
    pool = "vision_model.head"
    return Table(
        _tower(model, "vision_model."),
        copy(f"{pool}.probe", "attn_pool.latent"),
        _projections(f"{pool}.attention.in_proj", "attn_pool"),
        linear(f"{pool}.attention.out_proj", "attn_pool.proj"),
        norm(f"{pool}.layernorm", "attn_pool.norm"),
        *(linear(f"{pool}.mlp.{name}", f"attn_pool.mlp.{name}") for name in ("fc1", "fc2")),
        _unlike("classifier", "head", "SigLIP", "reads the mean of the patches"),
    )


def _projections(theirs: str, ours: str) -> Iterator[Row]:
    """PyTorch's attention has queries, keys and values in one array `[3 C, C]`, ours queries apart."""
    for leaf, own in (("weight", "kernel"), ("bias", "bias")):

        def to_ours(arrays: Arrays, sizes: Sequence[int]) -> Arrays:
            whole = arrays[0].T
            if whole.shape[-1] != sum(sizes):
                raise ValueError(f"shape {arrays[0].shape} cannot be cut into {' + '.join(map(str, sizes))}")
            return np.split(whole, [sizes[0]], axis=-1)

        def to_theirs(arrays: Arrays) -> Arrays:
            return [np.concatenate(arrays, axis=-1).T]

        yield from custom(f"{theirs}_{leaf}", [f"{ours}.{name}.{own}" for name in ("q", "kv")], to_ours, to_theirs)


def _clip(model: VisionTransformer) -> Table:
    return Table(
        _reshaped("vision_model.embeddings.class_embedding", "cls_token", 1),
        _tower(model, "vision_model."),
        norm("vision_model.pre_layrnorm", "norm_pre"),  # as they spell it
        projection("visual_projection", "head"),
    )


def _reshaped(theirs: str, ours: str, rank: int) -> Iterator[Row]:
    """An array that has axes of length one before its `rank` last ones here."""
    yield from custom(
        theirs,
        ours,
        lambda arrays, sizes: [arrays[0].reshape((1,) * (3 - rank) + arrays[0].shape)],
        lambda arrays: [arrays[0].reshape(arrays[0].shape[3 - rank :])],
    )


def projection(theirs: str, ours: str) -> Iterator[Row]:
    """A linear layer without a bias, which is a head here whose bias is zero.

    It can be written while that is so.
    """

    def to_ours(arrays: Arrays, sizes: Sequence[int]) -> Arrays:
        return [arrays[0].T, np.zeros(arrays[0].shape[:1], arrays[0].dtype)]

    def to_theirs(arrays: Arrays) -> Arrays:
        if arrays[1].any():
            raise ValueError(f"{theirs} has no bias there, and this model has learned one ({ours}.bias)")
        return [arrays[0].T]

    yield from custom(f"{theirs}.weight", [f"{ours}.kernel", f"{ours}.bias"], to_ours, to_theirs)


_KINDS: dict[str, Callable[[VisionTransformer], Table]] = {
    "vit": _vit,
    "deit": _vit,
    "dinov2": _dinov2,
    "siglip": _siglip,
    "clip": _clip,
}


# --- files ------------------------------------------------------------------------------------------------------------

_BODIES = re.compile(r"^(vit|deit|dinov2|dinov2_with_registers)\.(?=embeddings|encoder|layernorm|pooler)")
_LAYER = re.compile(r"(\w+\.)?encoder\.layer\.\d+\.attention\.attention\.query\.weight")
_TOWER = re.compile(r"(vision_model\.)?encoder\.layers\.\d+\.self_attn\.q_proj\.weight")
_BARE = re.compile(r"^(?=(embeddings|encoder\.layers|pre_layrnorm|post_layernorm|head)\.)")
_OTHER = re.compile(r"(text_model|text_projection|logit_scale|logit_bias)(\..*)?")
_BUFFER = re.compile(r".*embeddings\.position_ids")


def _rewrite(arrays: Flat, model: Any) -> tuple[Flat, list[str]]:
    """Of a classifier or of its body alone, as the model has it; what is not of the image tower is left out."""
    notes, body = [], _body(model)
    if any(_TOWER.fullmatch(name) for name in arrays):
        # Since its version 5 the library leaves this out where there is nothing beside the tower.
        arrays = {_BARE.sub("vision_model.", name): array for name, array in arrays.items()}
    kept = {name: array for name, array in arrays.items() if not (_OTHER.fullmatch(name) or _BUFFER.fullmatch(name))}
    if any(_OTHER.fullmatch(name) for name in arrays):
        notes.append("the text tower is left out")
    found: Flat = {}
    for name, array in kept.items():
        plain = _BODIES.sub("", name)
        inside = re.match(r"(embeddings|encoder|layernorm|pooler)\.", plain)
        if plain == "embeddings.mask_token":
            notes.append("mask_token is left out")
        elif plain.startswith("visual_projection.") and not model.num_classes:
            notes.append("visual_projection is left out: the model has no classifier")
        elif plain.startswith("pooler.") and model.pre_logits is None:
            notes += ["pooler is left out: the model has no pre_logits"] if plain == "pooler.dense.weight" else []
        else:
            found[body + plain if inside else plain] = array
    if model.dist_token is not None and "classifier.weight" in found and "cls_classifier.weight" not in found:
        for leaf in ("weight", "bias"):
            found[f"cls_classifier.{leaf}"] = found.pop(f"classifier.{leaf}")
    return found, notes


def _recognize(names: Collection[str]) -> bool:
    return any(_LAYER.fullmatch(name) or _TOWER.fullmatch(name) for name in names)


HUGGINGFACE = Dialect("Hugging Face", _recognize, _rewrite, layout="huggingface")
