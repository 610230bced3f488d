"""NAT, DiNAT and DiNAT_s, and the isotropic models, tied to SHI-Labs' implementation."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from families.vit.config import norm_eps
from official_config import Config, arguments, huggingface_options
from references import Reference, Values

from models.core.errors import unknown_name
from models.families.nat import FAMILIES
from models.families.nat.isotropic import IsotropicTransformer
from models.families.nat.model import NeighborhoodTransformer

_RENAMED = {
    "embed_dim": "width",
    "num_heads": "heads",
    "in_chans": "channels",
    "kernel_size": "window",
    "drop_path_rate": "drop_path",
    "drop_rate": "dropout",
    "attn_drop_rate": "attention_dropout",
}
_SAME = ("num_classes", "qkv_bias")
_SHARED: Config = {"kernel_size": 7, "norm_layer": "torch.nn.LayerNorm", "qk_scale": None}


def nat_options(config: Config) -> dict[str, Any]:
    """Keyword arguments of our NeighborhoodTransformer from those of NAT, DiNAT or DiNAT_s (`cls` says which).

    Raises:
      ValueError: an argument, or a value of one, without a counterpart here.
    """
    as_swin = config.get("cls") == "DiNAT_s"
    defaults = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "mlp_ratio": 4.0}
    given = arguments(config, {**_SHARED, **(defaults if as_swin else {})})
    own = ("mlp_ratio", "depths", "dilations", *(("patch_size", "patch_norm") if as_swin else ("layer_scale",)))
    options = _translated(given, own)
    options |= {name: given[name] for name in ("mlp_ratio", "depths")}
    options["dilations"] = given.get("dilations")
    if as_swin:
        if given.get("patch_size", 4) not in (4, [4, 4], (4, 4)):
            raise ValueError(f"DiNAT_s argument patch_size={given['patch_size']!r} has no counterpart here; allowed: 4")
        options |= {"stem": "patches", "downsample": "merging", "stem_norm": given.get("patch_norm", True)}
    else:
        options["layer_scale"] = given.get("layer_scale")
    return options


def isotropic_options(config: Config) -> dict[str, Any]:
    """Keyword arguments of our IsotropicTransformer from those of NATIsotropic; `cls` says with which layer.

    Raises:
      ValueError: an argument, or a value of one, without a counterpart here.
    """
    defaults = {"img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0}
    given = arguments(config, {**_SHARED, **defaults, "dilation": 2})
    own = ("img_size", "patch_size", "depth", "mlp_ratio", "dilation", "patch_norm", "layer")
    options = _translated(given, own)
    options |= {name: given[name] for name in ("patch_size", "depth")}
    options["image_size"] = given["img_size"] // given["patch_size"] * given["patch_size"]
    options["mlp_width"] = int(given["embed_dim"] * given["mlp_ratio"])
    options["pre_norm"] = given.get("patch_norm", True)
    if "VisionTransformerLayer" in f"{config.get('cls', '')} {given.get('layer', '')}":
        del options["window"]
        options["attention"] = "dense"
    else:
        options["dilation"] = given["dilation"]
    return options


def _translated(given: dict[str, Any], others: Sequence[str]) -> dict[str, Any]:
    """What all models have; `others` are known and translated by the caller."""
    options: dict[str, Any] = {}
    for key, value in given.items():
        if key in _SAME:
            options[key] = value
        elif key in _RENAMED:
            options[_RENAMED[key]] = value
        elif key not in others and key not in _SHARED:
            known = (*_SAME, *_RENAMED, *_SHARED, *others)
            raise ValueError(unknown_name("argument of the official model", key, known))
    options["norm_eps"] = norm_eps(given["norm_layer"])
    if given["qk_scale"]:
        options["attention_options"] = {"scale": given["qk_scale"]}
    return options


def evaluate_nat(model: NeighborhoodTransformer, inputs: Values, config: Config, stages: Sequence[str]) -> Values:
    """Logits (features without classes) as `y`, and the outputs of the official modules, maps `[B, Y, X, C]`."""
    firsts = [stage.blocks.first for stage in model.stages]
    blocks = {(i, j): first + j for i, first in enumerate(firsts) for j in range(model.stages[i].blocks.depth)}
    outputs = model.features(inputs["x"].transpose(0, 2, 3, 1), layers=list(blocks.values()))
    last = len(firsts) - 1
    named = _named(outputs, outputs[f"stages.{last}"].shape)
    named["norm"] = outputs["tokens"].reshape(outputs[f"stages.{last}"].shape)
    for levels in ("levels", "layers"):
        for i in range(len(firsts)):
            # Theirs downsample at the end of a level.
            named[f"{levels}.{i}"] = outputs[f"stages.{i + 1}.embedded" if i < last else f"stages.{i}"]
            named[f"{levels}.{i}.downsample"] = named[f"{levels}.{i}"]
        for i, j in blocks:
            shape = outputs[f"stages.{i}"].shape
            named[f"{levels}.{i}.blocks.{j}"] = outputs[f"stages.{i}.blocks.{j}"].reshape(shape)
    return {"y": named["head"]} | {module: named[module] for module in stages}


def evaluate_isotropic(model: IsotropicTransformer, inputs: Values, config: Config, stages: Sequence[str]) -> Values:
    """As `evaluate_nat`; the final norm acts on tokens `[B, N, C]`."""
    outputs = model.features(inputs["x"].transpose(0, 2, 3, 1), layers=range(model.depth))
    shape = (inputs["x"].shape[0], *model.grid.shape, model.width)
    named = _named(outputs, shape) | {"norm": outputs["tokens"]}
    named |= {f"layers.{layer}": outputs[f"blocks.{layer}"].reshape(shape) for layer in range(model.depth)}
    named["layers"] = named[f"layers.{model.depth - 1}"]
    return {"y": named["head"]} | {module: named[module] for module in stages}


def _named(outputs: dict[str, jax.Array], shape: tuple[int, ...]) -> Values:
    embedded = outputs["embedded"]
    return {
        "patch_embed": embedded if embedded.ndim == 4 else embedded.reshape(shape),
        "avgpool": jnp.expand_dims(outputs["pooled"], -1),
        "head": outputs["logits" if "logits" in outputs else "pooled"],
    }


REFERENCES = (
    Reference(
        name="nat",
        options=nat_options,
        golden=("nat", "nat[0-9]*", "nat_[!i]*", "dinat", "dinat[0-9]*", "dinat_[!i]*"),
        evaluate=evaluate_nat,
        stacked=True,
    ),
    Reference(
        name="nat_isotropic",
        options=isotropic_options,
        golden=("nat_isotropic*", "dinat_isotropic*", "vitrpb*"),
        evaluate=evaluate_isotropic,
        stacked=True,
    ),
    Reference(
        name="nat_huggingface",
        of="nat",
        options=partial(huggingface_options, FAMILIES[0].configs),
        golden=("hf_dinat*", "hf_nat*"),
        evaluate=evaluate_nat,
        stacked=True,
    ),
)
