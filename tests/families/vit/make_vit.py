"""Makes the small ViT references beside this file from timm, for options that other references leave out.

Not run by the tests: it needs PyTorch and timm, which nothing else here does. Made with torch 2.13.0, timm 1.0.31:

    python tests/families/vit/make_vit.py

Every parameter is random, none is left at its initial value; forward and backward run in float64 from float32 numbers.
Each file holds `sd/<name>` (state dict), `x` (NCHW), `y`, `dx` (gradient of sum(y**2)) and `config` (constructor
arguments as JSON; names of classes as text, a partial as `{"_type": "functools.partial", "_args": [class], ...}`), and
`stage<i>` for the modules that the config names under `_stage_modules`.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from timm.layers import DiffAttention, GluMlp, LayerNorm, SwiGLUPacked
from timm.models import vision_transformer as timm_vit
from timm.models.deit import VisionTransformerDistilled

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
NO_CLASS = {"class_token": False, "global_pool": "avg"}
PARALLEL = {"block_fn": "ParallelScalingBlock", "mlp_ratio": 2.0}
CASES: dict[str, tuple[dict, tuple[int, int]]] = {
    "vit_post_norm": (
        {"block_fn": "ResPostBlock", **NO_CLASS, "init_values": 1e-5, "qkv_bias": False},
        (32, 32),
    ),
    "vit_parallel": ({**PARALLEL, "init_values": 1e-5}, (32, 32)),
    "vit_parallel_no_bias": ({**PARALLEL, "qkv_bias": False, "qk_norm": True, "pre_norm": True}, (32, 32)),
    "vit_two_branch": ({"block_fn": "ParallelThingsBlock", "init_values": 1e-5, "mlp_ratio": 2.0}, (32, 32)),
    "vit_differential": ({"attn_layer": "DiffAttention", "qk_norm": True, "depth": 3, "mlp_ratio": 2.0}, (32, 32)),
    "vit_resampled": ({"reg_tokens": 2, "dynamic_img_size": True}, (48, 24)),
    "vit_resampled_patches": ({"no_embed_class": True, "reg_tokens": 4, "dynamic_img_size": True}, (16, 40)),
    "vit_siglip_tanh": (
        {**NO_CLASS, "img_size": [16, 32], "global_pool": "map", "act_layer": "gelu_tanh", "mlp_ratio": 2.0},
        (16, 32),
    ),
    "vit_gap_clip": (
        {"pre_norm": True, "qkv_bias": False, "global_pool": "avg", "fc_norm": False, "reg_tokens": 1},
        (32, 32),
    ),
    "vit_swiglu_qk_norm": (
        {"mlp_layer": "SwiGLUPacked", "act_layer": "silu", "qk_norm": True, "init_values": 1e-5, "pos_embed": "none"},
        (32, 32),
    ),
    "vit_map_registers": (
        {"global_pool": "map", "reg_tokens": 2, "mlp_layer": "SwiGLUPacked", "mlp_ratio": 3.25, "qk_norm": True},
        (32, 32),
    ),
    "vit_scale_norms": (
        {"proj_bias": False, "scale_attn_norm": True, "scale_mlp_norm": True, "mlp_layer": "GluMlp"}
        | {"act_layer": "quick_gelu", "global_pool": "avgmax", "pool_include_prefix": True}
        | {"norm_layer": {"_type": "functools.partial", "_args": ["LayerNorm"], "eps": 1e-3}, "mlp_ratio": 2.0},
        (32, 32),
    ),
    "vit_padded": (
        {"img_size": [37, 45], "patch_size": [8, 6], "dynamic_img_size": True, "dynamic_img_pad": True}
        | {"pre_norm": True, "global_pool": "avg", "mlp_ratio": 2.0, "num_classes": 0}
        | {"_stage_modules": ["patch_embed", "norm_pre", "blocks.1", "blocks", "norm", "fc_norm"]},
        (41, 30),
    ),
    "deit_distilled_odd": (
        {"cls": "VisionTransformerDistilled", "img_size": [37, 30], "depth": 3, "mlp_ratio": 2.0},
        (37, 30),
    ),
}
CLASSES = {
    "ResPostBlock": timm_vit.ResPostBlock,
    "ParallelScalingBlock": timm_vit.ParallelScalingBlock,
    "ParallelThingsBlock": timm_vit.ParallelThingsBlock,
    "DiffAttention": DiffAttention,
    "SwiGLUPacked": SwiGLUPacked,
    "GluMlp": GluMlp,
}


def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Every parameter away from its initial value, at the scale it would have in a trained network."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "gamma" in name:
            value = 0.7 + 0.2 * noise
        elif parameter.ndim == 1 and name.endswith("weight"):
            value = 1 + 0.1 * noise
        elif "token" in name or "pos_embed" in name or "latent" in name or "lambda" in name:
            value = 0.3 * noise
        elif name.endswith("bias"):
            value = 0.1 * noise
        else:
            value = noise / parameter[0].numel() ** 0.5
        parameter.data.copy_(value)


def record(stages: dict[str, torch.Tensor], name: str, module, inputs, output) -> None:
    """A forward hook."""
    stages[name] = output.detach().float()


def python_value(value):
    """What a config says of a constructor argument."""
    if isinstance(value, dict):
        return partial({"LayerNorm": LayerNorm}[value["_args"][0]], eps=value["eps"])
    if isinstance(value, list):
        return tuple(value)
    return CLASSES.get(value, value) if isinstance(value, str) else value


def write(name: str, model: torch.nn.Module, config: dict, x: torch.Tensor) -> None:
    """Runs a model in float64 and writes its file; other generators beside this one call it, too."""
    state = {f"sd/{key}": value.numpy().copy() for key, value in model.state_dict().items()}
    wide = x.double().requires_grad_()
    stages: dict[str, torch.Tensor] = {}
    for number, module in enumerate(config.get("_stage_modules", [])):
        model.get_submodule(module).register_forward_hook(partial(record, stages, f"stage{number}"))
    y = model.double()(wide)
    (dx,) = torch.autograd.grad((y**2).sum(), wide)
    arrays = {"x": x, "y": y.detach().float(), "dx": dx.float()} | stages
    arrays = {key: value.numpy() for key, value in arrays.items()}
    path = Path(__file__).parent / f"{name}.npz"
    np.savez_compressed(path, config=json.dumps(config), **arrays, **state)
    print(path.name, path.stat().st_size // 1024, "KB", y.detach().abs().max().item())


def main() -> None:
    """Writes one file per case."""
    for seed, (name, (options, size)) in enumerate(CASES.items()):
        config = SMALL | options
        arguments = {k: python_value(value) for k, value in config.items() if k != "cls" and k[0] != "_"}
        generator = torch.Generator().manual_seed(seed)
        kind = VisionTransformerDistilled if "cls" in config else timm_vit.VisionTransformer
        model = kind(**arguments).eval()
        randomize(model, generator)
        write(name, model, config, torch.randn(2, 3, *size, generator=generator))


if __name__ == "__main__":
    main()
