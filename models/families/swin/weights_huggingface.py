"""Hugging Face's names for the weights of a Swin, and its `config.json` as our options."""

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from models.families.swin.model import SwinTransformer
from models.families.swin.weights import bias_index, relative_bias, windows
from models.weights.family import Dialect
from models.weights.huggingface import Config, Keys, classes
from models.weights.table import Flat, Row, Table, constant, conv, linear, norm


def huggingface_table(model: SwinTransformer) -> Table:
    """Names of SwinForImageClassification; without classes those of SwinModel. Theirs have the merging at the end of a
    stage, ours at the start of the next.
    """
    body = _body(model)
    block, ours = f"{body}encoder.layers.{{}}.blocks.{{}}", "stages.{}.blocks.{}"
    return Table(
        conv(f"{body}embeddings.patch_embeddings.projection", "patch_embed.proj"),
        norm(f"{body}embeddings.norm", "patch_embed.norm"),
        norm(f"{block}.layernorm_before", f"{ours}.norm1"),
        norm(f"{block}.layernorm_after", f"{ours}.norm2"),
        linear([f"{block}.attention.self.{name}" for name in ("query", "key", "value")], f"{ours}.attn.qkv"),
        linear(f"{block}.attention.output.dense", f"{ours}.attn.proj"),
        linear(f"{block}.intermediate.dense", f"{ours}.mlp.fc1"),
        linear(f"{block}.output.dense", f"{ours}.mlp.fc2"),
        *(_bias(body, stage, window, model) for stage, window in enumerate(windows(model)) if window),
        *(_merging(body, stage) for stage in range(1, len(model.stages))),
        norm(f"{body}layernorm", "norm"),
        linear("classifier", "head"),
    )


def _body(model: SwinTransformer) -> str:
    return "swin." if model.num_classes else ""


def _bias(body: str, stage: int, window: Sequence[int], model: SwinTransformer) -> Iterator[Row]:
    """The table of a stage, and the index into it that published files keep for each block."""
    theirs, table = f"{body}encoder.layers.{stage}.blocks.{{}}.attention.self", "relative_position_bias_table"
    yield from relative_bias(f"{theirs}.{table}", f"stages.{stage}.blocks.{{}}.attn.relative_bias", window)
    for block in range(model.options.depths[stage]):
        yield from constant(f"{theirs.format(block)}.relative_position_index", bias_index(window))


def _merging(body: str, stage: int) -> Iterator[Row]:
    theirs, ours = f"{body}encoder.layers.{stage - 1}.downsample", f"stages.{stage}.downsample"
    yield from norm(f"{theirs}.norm", f"{ours}.norm")
    yield from linear(f"{theirs}.reduction", f"{ours}.reduction")


_LAYER = re.compile(r"(swin\.)?encoder\.layers\.\d+\.blocks\.\d+\.attention\.self\.query\.weight")
_INSIDE = re.compile(r"(embeddings|encoder|layernorm)\.")


def _rewrite(arrays: Flat, model: Any) -> tuple[Flat, list[str]]:
    """Of a classifier or of its body alone, as the model has it."""
    body, notes, found = _body(model), list[str](), {}
    for name, array in arrays.items():
        plain = name.removeprefix("swin.")
        if plain == "embeddings.mask_token":
            notes.append("mask_token is left out")
        else:
            found[body + plain if _INSIDE.match(plain) else plain] = array
    return found, notes


def _recognize(names: Collection[str]) -> bool:
    return any(_LAYER.fullmatch(name) for name in names)


HUGGINGFACE = Dialect("Hugging Face", _recognize, _rewrite, layout="huggingface")


# --- config.json ------------------------------------------------------------------------------------------------------

_DEFAULTS: Config = {
    "image_size": 224,
    "patch_size": 4,
    "num_channels": 3,
    "embed_dim": 96,
    "window_size": 7,
    "mlp_ratio": 4.0,
    "depths": (2, 2, 6, 2),
    "num_heads": (3, 6, 12, 24),
    "qkv_bias": True,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "use_absolute_embeddings": False,
}
_RENAMED = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "channels",
    "embed_dim": "width",
    "window_size": "window",
    "mlp_ratio": "mlp_ratio",
    "depths": "depths",
    "num_heads": "heads",
    "qkv_bias": "qkv_bias",
    "hidden_act": "activation",
    "layer_norm_eps": "norm_eps",
}


def _options(config: Config) -> dict[str, Any]:
    if config["use_absolute_embeddings"]:
        raise ValueError("use_absolute_embeddings=True in config.json: a Swin with learned positions is not there")
    return {"num_classes": classes(config), "pad_first": True}


CONFIGS = {"swin": Keys(_DEFAULTS, _RENAMED, _options)}
"""By `model_type`."""
