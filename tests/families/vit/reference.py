"""The ViT family and the attention pooling of SigLIP, tied to timm's."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from families.vit.config import pool_options, vit_options
from official_config import Config, arguments, huggingface_options
from references import Reference, Values

import models
from attn import Grid
from models.core.call import Call
from models.families.vit import FAMILY
from models.families.vit.weights import attention_pool_rows
from models.hosts.isotropic import VisionTransformer
from models.layers.pool import AttentionPool
from models.weights.table import Table


def official_images(x: jax.Array, model: VisionTransformer, config: Config) -> jax.Array:
    """timm's images `[B, C, Y, X]` as ours `[B, Y, X, C]`.

    Where a side is not divisible by the patch, timm's convolution does not see the rest, or with `dynamic_img_pad`
    sees zeros behind it.
    """
    pad = config.get("dynamic_img_pad", False)
    for axis, patch in zip((2, 3), model.patch_embed.patch, strict=True):
        rest = x.shape[axis] % patch
        if rest and pad:
            x = jnp.pad(x, [(0, patch - rest) if i == axis else (0, 0) for i in range(4)])
        elif rest:
            x = jax.lax.slice_in_dim(x, 0, x.shape[axis] - rest, axis=axis)
    return x.transpose(0, 2, 3, 1)


def evaluate_vit(model: VisionTransformer, inputs: Values, config: Config, stages: Sequence[str]) -> Values:
    """Logits (features without classes) as `y`, and the outputs of timm's modules."""
    images = official_images(inputs["x"], model, config)
    layers = [int(module.split(".")[1]) for module in stages if module.startswith("blocks.")]
    outputs = model.features(images, layers=[*layers, -1])
    final = "mean_logits" if "mean_logits" in outputs else "logits" if "logits" in outputs else "pooled"
    patches = model.patch_embed(images)
    if config.get("dynamic_img_size"):
        patches = patches.reshape(-1, *model.patch_embed.grid_shape(*images.shape[1:3]), model.width)
    named = outputs | {
        "patch_embed": patches,
        "norm_pre": outputs["embedded"],
        "blocks": outputs[f"blocks.{model.depth - 1}"],
        "norm": outputs["tokens"],
        "attn_pool": outputs["pooled"],
        "fc_norm": outputs["pooled"],
        "head": outputs["logits" if "logits" in outputs else "pooled"],
        "head_dist": outputs["distillation_logits" if "distillation_logits" in outputs else "pooled"],
    }
    return {"y": outputs[final]} | {module: named[module] for module in stages}


def evaluate_pool(model: AttentionPool, inputs: Values, config: Config, stages: Sequence[str]) -> Values:
    """Pooled tokens as `y`."""
    return {"y": model(inputs["x"], Call(Grid(inputs["x"].shape[1:2])))}


def evaluate_huggingface(model: VisionTransformer, inputs: Values, config: Config, stages: Sequence[str]) -> Values:
    """What classes of Hugging Face return; `interp/` for images of another size."""
    found = _of_images(model, inputs["x"], str(config["cls"]))
    if "interp/x" in inputs:
        found |= {f"interp/{name}": x for name, x in _of_images(model, inputs["interp/x"], str(config["cls"])).items()}
    return found


def _of_images(model: VisionTransformer, x: jax.Array, kind: str) -> Values:
    tap = models.record("probs", layers=range(model.depth))  # not of a pooling
    outputs = model.features(official_images(x, model, {}), layers=range(model.depth), tap=tap)
    hidden = [outputs["embedded"], *(outputs[f"blocks.{layer}"] for layer in range(model.depth))]
    # The image tower of CLIP has its last norm in the pooling.
    last = hidden[-1] if "CLIP" in kind else outputs["tokens"]
    pooled = outputs["pooled"]
    tokens = pooled if "Siglip" in kind else last
    y = outputs["mean_logits"] if "mean_logits" in outputs else outputs.get("logits", tokens)
    return {
        "y": y,
        "hidden_states": jnp.stack(hidden),
        "attentions": tap["probs"],
        "last_hidden_state": last,
        "pooler_output": pooled,
    }


_TORCHVISION = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_layers": "depth",
    "num_heads": "heads",
    "hidden_dim": "width",
    "mlp_dim": "mlp_width",
    "num_classes": "num_classes",
    "representation_size": "pre_logits",
}


def torchvision_options(config: Config) -> dict[str, Any]:
    """Of torchvision's VisionTransformer."""
    return {_TORCHVISION[key]: value for key, value in arguments(config).items()}


REFERENCES = (
    Reference(
        name="vit",
        options=vit_options,
        golden=("vit", "vit_*", "vit[0-9]*", "deit", "deit_*", "deit[0-9]*"),
        evaluate=evaluate_vit,
        stacked=True,
    ),
    Reference(
        name="vit_huggingface",
        of="vit",
        options=partial(huggingface_options, FAMILY.configs),
        golden=("hf_vit*", "hf_deit*", "hf_dinov2*", "hf_siglip*", "clip_vision*"),
        evaluate=evaluate_huggingface,
        inputs=("x", "interp/x"),
        stacked=True,
    ),
    Reference(
        name="vit_torchvision",
        of="vit",
        options=torchvision_options,
        golden=("torchvision_vit*",),
        evaluate=evaluate_vit,
        stacked=True,
    ),
    Reference(
        name="siglip_pool",
        module=(AttentionPool, lambda model: Table(attention_pool_rows(""))),
        options=pool_options,
        golden=("probe_siglip*",),
        evaluate=evaluate_pool,
    ),
)
