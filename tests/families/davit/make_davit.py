"""Makes the small DaViT references beside this file from timm, for options and sizes that other references leave out.

Not run by the tests: it needs PyTorch and timm. Made with torch 2.13.0, timm 1.0.31, as `make_vit.py` says:

    python tests/families/davit/make_davit.py
"""

import torch
from make_vit import python_value, randomize, write
from timm.models.davit import DaVit

SMALL = {
    "cls": "timm.models.davit.DaVit",
    "depths": [1, 1],
    "embed_dims": [8, 12],
    "num_heads": [2, 3],
    "num_classes": 5,
}
CASES: dict[str, tuple[dict, tuple[int, int]]] = {
    # Maps of 11 x 9 and 6 x 5 places, which windows do not divide, and neither the halving.
    "davit_odd": (
        {"window_size": [5, 3], "qkv_bias": False, "mlp_ratio": 2, "norm_eps": 1e-3, "depths": [1, 2]}
        | {"head_norm_first": True, "global_pool": "catavgmax"}
        | {"_stage_modules": ["stem", "stages.0.blocks.0.0", "stages.1.downsample", "stages.1.blocks.1", "norm_pre"]},
        (41, 35),
    ),
    "davit_fl_odd": (
        {"window_size": 5, "named_blocks": True, "channel_attn_v2": True, "down_kernel_size": 3, "cpe_act": True}
        | {"num_classes": 0, "embed_dims": [8, 10], "num_heads": [1, 2]}
        | {"_stage_modules": ["stages.0.blocks.0.channel_block", "stages.1.downsample", "stages.1.blocks.0"]},
        (34, 50),
    ),
    "davit_channels": (
        {"attn_types": ["channel"], "ffn": False, "global_pool": "max", "down_kernel_size": 4, "in_chans": 2}
        | {"_stage_modules": ["stages.0", "stages.1.blocks.0.0", "head.norm"]},
        (44, 24),
    ),
    "davit_reversed": (
        {"attn_types": ["channel", "spatial"], "named_blocks": True, "window_size": 2, "global_pool": "avgmax"}
        | {"_stage_modules": ["stages.0.blocks.0.channel_block", "stages.1", "head"]},
        (24, 32),
    ),
}


def main() -> None:
    """Writes one file per case."""
    for seed, (name, (options, size)) in enumerate(CASES.items()):
        config = SMALL | options
        arguments = {k: python_value(v) for k, v in config.items() if k != "cls" and k[0] != "_"}
        generator = torch.Generator().manual_seed(seed)
        model = DaVit(**arguments).eval()
        randomize(model, generator)
        write(name, model, config, torch.randn(2, config.get("in_chans", 3), *size, generator=generator))


if __name__ == "__main__":
    main()
