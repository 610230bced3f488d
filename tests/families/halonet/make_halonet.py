"""Makes the small HaloNet references beside this file from timm, for options and sizes that other references leave out.

Not run by the tests, like `make_vit.py`, whose files these are like: it needs PyTorch and timm.

    python tests/families/halonet/make_halonet.py

`config` holds the arguments of timm's ByobNet, configuration objects as dictionaries with their class under `_type`, or
those of timm's HaloAttn. Running statistics of batch norms are those of the input at each layer, then perturbed.
"""

import torch
from make_vit import randomize, write
from timm.layers.halo_attn import HaloAttn
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

CLASSES = {kind.__name__: kind for kind in (ByoModelCfg, ByoBlockCfg)}


def block(kind: str, width: int, stride: int = 1, depth: int = 1, **own) -> dict:
    """A ByoBlockCfg."""
    return {"_type": "ByoBlockCfg", "type": kind, "d": depth, "c": width, "s": stride, "gs": 0, "br": 0.5} | own


def case(blocks: list, stages: list[str], call: dict, **model) -> dict:
    """The arguments of one model."""
    cfg = {"_type": "ByoModelCfg", "blocks": blocks, **model}
    return {"cls": "timm ByobNet", "cfg": cfg, "num_classes": 5, "_stage_modules": stages, **call}


CASES: dict[str, tuple[dict, tuple[int, int]]] = {
    # Squeeze-excite in blocks of grouped convolutions, biased halo attention that is averaged, features behind.
    "halonet_hybrid": (
        case(
            [
                block("bottle", 16, gs=4, br=1.0, depth=2),
                [block("bottle", 24, 2, gs=4), block("self_attn", 24), block("bottle", 24, attn_layer="")],
                block("self_attn", 32, 2, depth=2, self_attn_kwargs={"block_size": 2, "avg_down": True}),
            ],
            ["stem", "stages.0", "stages.1.1", "stages.1", "stages.2.0", "final_conv"],
            {"global_pool": "avgmax", "in_chans": 2},
            downsample="avg",
            stem_type="tiered",
            stem_pool="",
            stem_chs=16,
            num_features=20,
            act_layer="silu",
            attn_layer="se",
            attn_kwargs={"rd_ratio": 0.25, "act_layer": "silu", "gate_layer": "hard_sigmoid"},
            self_attn_layer="halo",
            self_attn_kwargs={"block_size": 4, "halo_size": 1, "num_heads": 4, "qkv_bias": True, "dim_head": 5},
        ),
        (64, 32),
    ),
    # No shortcut where the width changes, inner channels from the input's, blocks of odd side with a stride.
    "halonet_regnet": (
        case(
            [
                [block("bottle", 16, br=2.0), block("self_attn", 16, br=2.0)],
                block("self_attn", 24, 2, br=1.5, depth=2),
                block("bottle", 24, 2, br=2.0, gs=8),
            ],
            ["stem", "stages.0.0", "stages.0.1", "stages.1", "stages.2"],
            {},
            downsample="",
            stem_type="3x3",
            stem_pool="",
            stem_chs=8,
            act_layer="gelu",
            width_factor=0.7,
            attn_layer="eca",
            block_kwargs={"bottle_in": True, "linear_out": True},
            self_attn_layer="halo",
            self_attn_kwargs={"block_size": 7, "halo_size": 2, "qk_ratio": 0.33, "num_heads": 4},
        ),
        (56, 28),
    ),
    # Attention over whole maps that are not square, beside halo attention; gates behind the last convolution.
    "halonet_global": (
        case(
            [
                block("bottle", 16, block_kwargs={"attn_last": True, "extra_conv": True, "kernel_size": 5}),
                [
                    block("self_attn", 24, 2),
                    block("bottle", 24, br=1.0),
                    block("self_attn", 24, self_attn_layer="halo", self_attn_kwargs={"block_size": 2, "halo_size": 1}),
                ],
                block("self_attn", 24, block_kwargs={"extra_conv": True, "post_attn_na": False}),
            ],
            ["stem", "stages.0", "stages.1.0", "stages.1.2", "stages.2", "head"],
            {"img_size": [48, 32], "global_pool": "max"},
            stem_type="quad2",
            stem_pool=None,
            stem_chs=16,
            act_layer="hard_swish",
            attn_layer="se",
            attn_kwargs={"rd_channels": 6, "bias": False},
            self_attn_layer="bottleneck",
            self_attn_kwargs={"num_heads": 2, "qkv_bias": True, "scale_pos_embed": True},
        ),
        (48, 32),
    ),
    # As the paper has it, attention in every block, with a stem of 7 x 7; pooled features only.
    "halonet_paper": (
        case(
            [block("self_attn", 16, br=1.0), block("self_attn", 24, 2, br=0.7, depth=2)],
            ["stem", "stages.0", "stages.1"],
            {"num_classes": 0},
            stem_type="7x7",
            stem_pool="maxpool",
            stem_chs=8,
            act_layer="silu",
            self_attn_layer="halo",
            self_attn_kwargs={"block_size": 4, "halo_size": 3},
        ),
        (32, 64),
    ),
    # A halo larger than the block, whose odd side turns the stride into a mean.
    "halo_attn_wide": (
        {"cls": "timm.layers.HaloAttn", "dim": 12, "dim_out": 20, "num_heads": 5, "block_size": 3, "halo_size": 4}
        | {"stride": 2, "qkv_bias": True, "qk_ratio": 0.5},
        (12, 6),
    ),
    "halo_attn_strided": (
        {"cls": "timm.layers.HaloAttn", "dim": 8, "num_heads": 2, "dim_head": 3, "block_size": 6, "halo_size": 1}
        | {"stride": 2, "qkv_bias": True, "scale_pos_embed": True},
        (6, 18),
    ),
    "halo_attn_mean": (
        {"cls": "timm.layers.HaloAttn", "dim": 8, "num_heads": 1, "block_size": 2, "halo_size": 0, "stride": 2}
        | {"avg_down": True},
        (4, 6),
    ),
}


def build(value):
    """Objects of a config, from inside out."""
    if isinstance(value, list):
        return [build(one) for one in value]
    if not isinstance(value, dict):
        return value
    options = {name: build(one) for name, one in value.items() if name[0] != "_"}
    return CLASSES[value["_type"]](**options) if "_type" in value else options


def settle(model: torch.nn.Module, x: torch.Tensor, generator: torch.Generator) -> None:
    """Running statistics of what every layer is given by layers that are settled already."""

    def look(norm, inputs):
        (value,) = inputs
        std, mean = torch.std_mean(value, (0, 2, 3))
        norm.running_mean.copy_(mean + 0.1 * std * torch.randn(mean.shape, generator=generator))
        norm.running_var.copy_(std**2 * (0.7 + 0.6 * torch.rand(mean.shape, generator=generator)))

    hooks = [
        module.register_forward_pre_hook(look) for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()


def main() -> None:
    """Writes one file per case."""
    for seed, (name, (config, size)) in enumerate(CASES.items()):
        generator = torch.Generator().manual_seed(seed)
        arguments = {key: value for key, value in build(config).items() if key != "cls"}
        model = (HaloAttn if "HaloAttn" in config["cls"] else ByobNet)(**arguments).eval()
        randomize(model, generator)
        channels = config.get("dim") or config.get("in_chans", 3)
        x = torch.randn(2, channels, *size, generator=generator)
        settle(model, x, generator)
        write(name, model, config, x)


if __name__ == "__main__":
    main()
