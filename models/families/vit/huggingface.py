"""Hugging Face's `config.json` of ViT, DeiT, DINOv2, and of the image towers of SigLIP and CLIP, as our options."""

from typing import Any

from models.weights.huggingface import Config, Keys, classes

_RENAMED = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "hidden_act": "activation",
    "layer_norm_eps": "norm_eps",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "channels",
    "qkv_bias": "qkv_bias",
}
_BASE: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_channels": 3}
_VIT: dict[str, Any] = _BASE | {
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "qkv_bias": True,
}
_DINOV2: dict[str, Any] = _BASE | {
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 224,
    "patch_size": 14,
    "qkv_bias": True,
    "layerscale_value": 1.0,
    "use_swiglu_ffn": False,
}
_SIGLIP: dict[str, Any] = _BASE | {
    "intermediate_size": 3072,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "image_size": 224,
    "patch_size": 16,
    "vision_use_head": True,
}
_CLIP: dict[str, Any] = _BASE | {
    "intermediate_size": 3072,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "image_size": 224,
    "patch_size": 32,
    "projection_dim": 512,
}


def _vit(config: Config) -> dict[str, Any]:
    return {"num_classes": classes(config), "position_resample": "cubic"}


def _deit(config: Config) -> dict[str, Any]:
    if "DeiTForImageClassification" in (config.get("architectures") or ()):
        raise ValueError(
            "DeiTForImageClassification has a distillation token and no classifier of it; here is one "
            "(DeiTForImageClassificationWithTeacher)"
        )
    return _vit(config) | {"distillation_token": True}


def _dinov2(config: Config) -> dict[str, Any]:
    if classes(config):
        raise ValueError(
            "a classifier on the class token beside the mean of the patches, as DINOv2 of Hugging Face has it, is not "
            "there; the body alone is (Dinov2Model)"
        )
    width, ratio = config["hidden_size"], config["mlp_ratio"]
    hidden = int(width * ratio)
    gated = {"mlp": "swiglu", "mlp_width": (int(hidden * 2 / 3) + 7) // 8 * 8}
    registers = int(config.get("num_register_tokens", 0))
    return {
        "num_classes": 0,
        "layer_scale": float(config["layerscale_value"]),
        "registers": registers,
        # Only with registers does the library smooth positions before it makes them fewer.
        "position_resample": "bicubic" if "num_register_tokens" in config else "cubic",
        **(gated if config["use_swiglu_ffn"] else {"mlp_width": hidden}),
    }


def _siglip(config: Config) -> dict[str, Any]:
    if not config["vision_use_head"]:
        raise ValueError("vision_use_head=False in config.json: a SigLIP tower without its pooling is not there")
    return {"num_classes": 0, "class_token": False, "pool": "map", **_whole_patches(config)}


def _clip(config: Config) -> dict[str, Any]:
    projected = any(str(name) in PROJECTED for name in config.get("architectures") or ())
    return {
        "num_classes": int(config["projection_dim"]) if projected else 0,
        "pre_norm": True,
        **_whole_patches(config),
    }


def _whole_patches(config: Config) -> dict[str, Any]:
    """What lies behind the last whole patch is not seen there: 378 of 384 pixels in patches of 14."""
    side, patch = int(config["image_size"]), int(config["patch_size"])
    return {"image_size": side // patch * patch, "position_resample": "cubic"}


def _tower(config: Config) -> Config:
    """The image tower in a config of both towers."""
    whole = {key: config[key] for key in ("architectures", "projection_dim") if key in config}
    return {**config.get("vision_config", {}), **whole}


PROJECTED = ("CLIPVisionModelWithProjection", "CLIPModel")
"""Classes whose image tower ends with the projection to the space of texts."""

CONFIGS = {
    "vit": Keys(_VIT, _RENAMED, _vit),
    "deit": Keys(_VIT, _RENAMED, _deit),
    "dinov2": Keys(_DINOV2, _RENAMED, _dinov2),
    "dinov2_with_registers": Keys(_DINOV2 | {"num_register_tokens": 4}, _RENAMED, _dinov2),
    "siglip_vision_model": Keys(_SIGLIP, _RENAMED, _siglip),
    "clip_vision_model": Keys(_CLIP, _RENAMED, _clip),
    "siglip": Keys({}, {}, lambda config: Keys(_SIGLIP, _RENAMED, _siglip).read(_tower(config))),
    "clip": Keys({}, {}, lambda config: Keys(_CLIP, _RENAMED, _clip).read(_tower(config))),
}
"""By `model_type`."""
