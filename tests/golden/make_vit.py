"""Makes the small ViT references beside this file from timm, for options that other references leave out.

Not run by the tests: it needs PyTorch and timm, which nothing else here does. Made with torch 2.13.0, timm 1.0.31:

    python tests/golden/make_vit.py

Every parameter is random, none is left at its initial value; forward and backward run in float64 from float32 numbers.
Each file holds `sd/<name>` (state dict), `x` (NCHW), `y`, `dx` (gradient of sum(y**2)) and `config` (constructor
arguments as JSON; names of classes as text).
"""

import json
from pathlib import Path

import numpy as np
import torch
from timm.layers import DiffAttention, SwiGLUPacked
from timm.models import vision_transformer as timm_vit

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
}
CLASSES = {
    "ResPostBlock": timm_vit.ResPostBlock,
    "ParallelScalingBlock": timm_vit.ParallelScalingBlock,
    "ParallelThingsBlock": timm_vit.ParallelThingsBlock,
    "DiffAttention": DiffAttention,
    "SwiGLUPacked": SwiGLUPacked,
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


def main() -> None:
    """Writes one file per case."""
    for seed, (name, (options, size)) in enumerate(CASES.items()):
        config = SMALL | options
        arguments = {k: CLASSES.get(value, value) if isinstance(value, str) else value for k, value in config.items()}
        generator = torch.Generator().manual_seed(seed)
        model = timm_vit.VisionTransformer(**arguments).eval()
        randomize(model, generator)
        state = {f"sd/{key}": value.numpy().copy() for key, value in model.state_dict().items()}
        x = torch.randn(2, 3, *size, generator=generator)
        wide = x.double().requires_grad_()
        y = model.double()(wide)
        (dx,) = torch.autograd.grad((y**2).sum(), wide)
        arrays = {"x": x, "y": y.detach().float(), "dx": dx.float()}
        arrays = {key: value.numpy() for key, value in arrays.items()}
        path = Path(__file__).parent / f"{name}.npz"
        np.savez_compressed(path, config=json.dumps(config), **arrays, **state)
        print(path.name, path.stat().st_size // 1024, "KB", y.detach().abs().max().item())


if __name__ == "__main__":
    main()
