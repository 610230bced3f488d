"""Makes the small Swin references beside this file from timm, for options and sizes that other references leave out.

Not run by the tests: it needs PyTorch and timm. Made with torch 2.13.0, timm 1.0.31, as `make_vit.py` says:

    python tests/families/swin/make_swin.py
"""

import torch
from make_vit import python_value, randomize, write
from timm.models.swin_transformer import SwinTransformer

SMALL = {"cls": "timm SwinTransformer", "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "num_classes": 5}
CASES: dict[str, tuple[dict, tuple[int, int]]] = {
    # Maps of 8 x 16 places, and of 4 x 8: shifted along the columns only.
    "swin_wide": (
        {"img_size": [32, 64], "window_size": 4, "head_dim": [6, None], "mlp_ratio": [2.0, 3.0], "qkv_bias": False}
        | {"depths": [2, 3]}
        | {"_stage_modules": ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.downsample", "layers.1.blocks.1"]},
        (32, 64),
    ),
    # Maps that windows do not divide, of another size than the model is made for.
    "swin_padded": (
        {"img_size": [36, 44], "dynamic_img_size": True, "window_size": 4, "global_pool": "avgmax"}
        | {"norm_layer": {"_type": "functools.partial", "_args": ["LayerNorm"], "eps": 1e-3}}
        | {"_stage_modules": ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.1", "norm", "head"]},
        (52, 36),
    ),
    # The window of the second stage is larger than its map, and shifted all the same. Pixels behind the last patch.
    "swin_partition": (
        {"img_size": [35, 33], "always_partition": True, "window_size": [3, 5], "global_pool": "catavgmax"}
        | {"_stage_modules": ["patch_embed", "layers.0.blocks.1", "layers.1.blocks.0", "layers.1.blocks.1"]},
        (35, 33),
    ),
    "swin_stages": (
        {"img_size": 40, "patch_size": 2, "in_chans": 1, "window_size": [4, [2, 5], 7], "num_classes": 0}
        | {"depths": [1, 2, 1], "num_heads": [1, 2, 4], "_stage_modules": ["layers.0", "layers.1", "layers.2"]},
        (40, 40),
    ),
}


def tuples(value):
    """Windows and widths of heads are told from lists of stages by their type."""
    return tuple(tuples(entry) for entry in value) if isinstance(value, list) else python_value(value)


def main() -> None:
    """Writes one file per case."""
    for seed, (name, (options, size)) in enumerate(CASES.items()):
        config = SMALL | options
        arguments = {k: tuples(v) for k, v in config.items() if k != "cls" and k[0] != "_"}
        generator = torch.Generator().manual_seed(seed)
        model = SwinTransformer(**arguments).eval()
        randomize(model, generator)
        for parameter, value in model.named_parameters():
            if parameter.endswith("relative_position_bias_table"):
                value.data.copy_(0.5 * torch.randn(value.shape, generator=generator))
        write(name, model, config, torch.randn(2, config.get("in_chans", 3), *size, generator=generator))


if __name__ == "__main__":
    main()
