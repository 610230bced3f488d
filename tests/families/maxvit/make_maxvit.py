"""Makes the small MaxViT references beside this file from timm, for options that other references leave out.

Not run by the tests, like `make_vit.py`, whose files these are like: it needs PyTorch and timm.

    python tests/families/maxvit/make_maxvit.py

`config` holds the arguments of timm's MaxxVit, configuration objects as dictionaries with their class under `_type`.
Running statistics of batch norms are random, too.
"""

import torch
from make_vit import randomize, write
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg

CLASSES = {kind.__name__: kind for kind in (MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg)}
TF_CONV = {"norm_eps": 1e-3, "act_layer": "gelu_tanh", "padding": "same"}
TF_TRANSFORMER = {"norm_eps": 1e-5, "act_layer": "gelu_tanh", "head_first": False, "rel_pos_type": "bias_tf"}
SMALL = {"embed_dim": [8, 12, 16], "depths": [1, 2, 1], "block_type": ["M"] * 3, "stem_bias": True}
STAGES = ["stem", "stages.0.blocks.0", "stages.1.blocks.1", "stages.0", "stages.1", "stages.2"]


def case(size: list[int], model: dict, conv: dict, transformer: dict, **call) -> dict:
    """The arguments of one model."""
    conv = {"_type": "MaxxVitConvCfg", **TF_CONV, **conv}
    transformer = {"_type": "MaxxVitTransformerCfg", **TF_TRANSFORMER, "dim_head": 4, **transformer}
    cfg = {"_type": "MaxxVitCfg", **SMALL, "conv_cfg": conv, "transformer_cfg": transformer, **model}
    return {"img_size": size, "num_classes": 5, "cfg": cfg, "_stage_modules": STAGES, **call}


CASES = {
    # Windows of 2 x 3 from the image; no dense layer before the head.
    "maxvit_wide": case([32, 48], {"stem_width": [6, 10]}, {}, {"partition_ratio": 16}),
    # Maps of odd sides, which "same" pads behind.
    "maxvit_odd": case(
        [30, 45],
        {"stem_width": 8, "stem_bias": False, "head_hidden_size": 20},
        {"stride_mode": "pool", "pool_type": "avg", "downsample_pool_type": "max", "attn_early": True}
        | {"kernel_size": 5, "expand_ratio": 3.0, "attn_ratio": 0.5, "attn_act_layer": "relu"},
        {"window_size": [2, 3], "grid_size": [1, 3], "init_values": 1e-5, "expand_ratio": 2.5},
        global_pool="avgmax",
        transformer_act_layer="gelu",
    ),
    "maxvit_centred": case(
        [48, 32],
        {"head_hidden_size": 16},
        {"padding": "", "stride_mode": "1x1", "pool_type": "max", "pre_norm_act": True, "expand_output": False}
        | {"output_bias": False, "act_layer": "silu", "group_size": 4, "attn_ratio": 1 / 16, "norm_eps": None},
        {"window_size": [3, 2], "no_block_attn": True, "attn_bias": False, "rel_pos_type": "", "norm_eps": 1e-6},
        global_pool="max",
        stem_width=8,
    ),
    "maxvit_averages": case(
        [48, 48],
        {"stem_width": 8, "head_hidden_size": 16, "embed_dim": [8, 8, 16]},
        {"padding": "", "stride_mode": "pool", "pool_type": "avg", "downsample_pool_type": "avg2", "attn_layer": ""},
        {"window_size": 3},
    ),
}


def python_value(value):
    """What a config says of a constructor argument."""
    if isinstance(value, dict):
        fields = {key: python_value(entry) for key, entry in value.items() if key != "_type"}
        return CLASSES[value["_type"]](**fields)
    return tuple(value) if isinstance(value, list) else value


def main() -> None:
    """Writes one file per case."""
    for seed, (name, config) in enumerate(CASES.items()):
        generator = torch.Generator().manual_seed(seed)
        model = MaxxVit(**{key: python_value(value) for key, value in config.items() if key[0] != "_"}).eval()
        randomize(model, generator)
        for buffer, value in model.named_buffers():
            noise = torch.randn(value.shape, generator=generator) if value.is_floating_point() else None
            if buffer.endswith("running_mean"):
                value.copy_(0.3 * noise)
            elif buffer.endswith("running_var"):
                value.copy_(0.5 + noise.abs())
        write(name, model, config, torch.randn(2, 3, *config["img_size"], generator=generator))


if __name__ == "__main__":
    main()
