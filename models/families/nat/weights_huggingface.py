"""Hugging Face's names for the weights of NAT and DiNAT, and its `config.json` as our options."""

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from models.families.nat.model import NeighborhoodTransformer
from models.layers.downsample import ConvDownsample
from models.layers.stem import ConvStem
from models.weights.family import Dialect
from models.weights.huggingface import Config, Keys, classes
from models.weights.table import Arrays, Flat, Row, Table, conv, copy, custom, linear, norm


def huggingface_table(model: NeighborhoodTransformer) -> Table:
    """Names of DinatForImageClassification (of NatForImageClassification without dilation); without classes those of
    the body. Theirs have the downsampling at the end of a level, ours at the start of the next stage.

    Raises:
      ValueError: DiNAT_s, which Hugging Face does not have.
    """
    if not isinstance(model.patch_embed, ConvStem):
        raise ValueError("Hugging Face has NAT and DiNAT, and no DiNAT_s (stem='patches')")
    body = _body(model)
    layer, ours = f"{body}encoder.levels.{{}}.layers.{{}}", "stages.{}.blocks.{}"
    patches = f"{body}embeddings.patch_embeddings.projection"
    return Table(
        *(conv(f"{patches}.{number}", f"patch_embed.conv{number + 1}") for number in (0, 1)),
        norm(f"{body}embeddings.norm", "patch_embed.norm"),
        norm(f"{layer}.layernorm_before", f"{ours}.norm1"),
        norm(f"{layer}.layernorm_after", f"{ours}.norm2"),
        linear([f"{layer}.attention.self.{name}" for name in ("query", "key", "value")], f"{ours}.attn.qkv"),
        linear(f"{layer}.attention.output.dense", f"{ours}.attn.proj"),
        copy(f"{layer}.attention.self.rpb", f"{ours}.attn.relative_bias"),
        linear(f"{layer}.intermediate.dense", f"{ours}.mlp.fc1"),
        linear(f"{layer}.output.dense", f"{ours}.mlp.fc2"),
        _layer_scale(f"{layer}.layer_scale_parameters", ours),
        *(_downsampling(body, model, stage) for stage in range(1, len(model.stages))),
        norm(f"{body}layernorm", "norm"),
        linear("classifier", "head"),
    )


def _body(model: NeighborhoodTransformer) -> str:
    options: Any = model.options
    if not model.num_classes:
        return ""
    return "nat." if options.dilations is None else "dinat."


def _layer_scale(theirs: str, ours: str) -> Iterator[Row]:
    """Both scales of a layer are one array `[2, C]` there."""

    def to_ours(arrays: Arrays, sizes: Sequence[int]) -> Arrays:
        if arrays[0].ndim != 2 or len(arrays[0]) != 2:
            raise ValueError(f"shape {arrays[0].shape} is not that of two scales")
        return [arrays[0][0], arrays[0][1]]

    yield from custom(theirs, [f"{ours}.ls1.gamma", f"{ours}.ls2.gamma"], to_ours, lambda arrays: [np.stack(arrays)])


def _downsampling(body: str, model: NeighborhoodTransformer, stage: int) -> Iterator[Row]:
    theirs, ours = f"{body}encoder.levels.{stage - 1}.downsample", f"stages.{stage}.downsample"
    if not isinstance(model.stages[stage].downsample, ConvDownsample):
        raise ValueError("Hugging Face has NAT and DiNAT with downsample='convolution' alone")
    yield from conv(f"{theirs}.reduction", f"{ours}.conv")
    yield from norm(f"{theirs}.norm", f"{ours}.norm")


_LAYER = re.compile(r"((di)?nat\.)?encoder\.levels\.\d+\.layers\.\d+\.attention\.self\.rpb")
_INSIDE = re.compile(r"(embeddings|encoder|layernorm)\.")


def _rewrite(arrays: Flat, model: Any) -> tuple[Flat, list[str]]:
    """Of a classifier or of its body alone, as the model has it."""
    body, found = _body(model), {}
    for name, array in arrays.items():
        plain = re.sub(r"^(di)?nat\.", "", name)
        found[body + plain if _INSIDE.match(plain) else plain] = array
    return found, []


def _recognize(names: Collection[str]) -> bool:
    return any(_LAYER.fullmatch(name) for name in names)


HUGGINGFACE = Dialect("Hugging Face", _recognize, _rewrite, layout="huggingface")


# --- config.json ------------------------------------------------------------------------------------------------------

_DEFAULTS: Config = {
    "num_channels": 3,
    "embed_dim": 64,
    "depths": (3, 4, 6, 5),
    "num_heads": (2, 4, 8, 16),
    "kernel_size": 7,
    "mlp_ratio": 3.0,
    "qkv_bias": True,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "layer_scale_init_value": 0.0,
}
_RENAMED = {
    "num_channels": "channels",
    "embed_dim": "width",
    "depths": "depths",
    "num_heads": "heads",
    "kernel_size": "window",
    "mlp_ratio": "mlp_ratio",
    "qkv_bias": "qkv_bias",
    "hidden_act": "activation",
    "layer_norm_eps": "norm_eps",
}
_DILATIONS = ((1, 8, 1), (1, 4, 1, 4), (1, 2, 1, 2, 1, 2), (1, 1, 1, 1, 1))


def _nat(config: Config) -> dict[str, Any]:
    scale = float(config["layer_scale_init_value"])
    return {"num_classes": classes(config), "layer_scale": scale if scale > 0 else None}


def _dinat(config: Config) -> dict[str, Any]:
    return _nat(config) | {"dilations": tuple(tuple(stage) for stage in config["dilations"])}


CONFIGS = {
    "nat": Keys(_DEFAULTS, _RENAMED, _nat),
    "dinat": Keys({**_DEFAULTS, "dilations": _DILATIONS}, _RENAMED, _dinat),
}
"""By `model_type`."""
