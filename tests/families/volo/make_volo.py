"""Makes the small VOLO references beside this file from timm, for options and sizes that other references leave out.

Not run by the tests: it needs PyTorch and timm. Made with torch 2.13.0, timm 1.0.31:

    python tests/families/volo/make_volo.py

As `make_vit.py` says; running statistics of batch norm are those of the input, perturbed.
"""

import torch
from make_vit import python_value, randomize, write
from timm.models.volo import VOLO

SMALL = {
    "cls": "timm.models.volo.VOLO",
    "layers": [1, 1, 1],
    "embed_dims": [12, 16, 16],
    "num_heads": [2, 4, 4],
    "stem_hidden_dim": 8,
    "num_classes": 5,
}
CASES: dict[str, tuple[dict, tuple[int, int]]] = {
    # Maps of 9 x 7 places, of which the halving drops the last row and column.
    "volo_odd": (
        {"layers": [2, 1, 2], "qkv_bias": True, "mlp_ratio": [2.0, 3.0, 2.5], "img_size": [72, 60]}
        | {"norm_layer": {"_type": "functools.partial", "_args": ["LayerNorm"], "eps": 1e-3}}
        | {"_stage_modules": ["network.0.0", "network.1", "network.2", "network.3", "post_network.1", "norm", "head"]},
        (72, 60),
    ),
    # Images that patches do not divide; outlook attention in two stages, halved twice; one head.
    "volo_two_halvings": (
        {"patch_size": 4, "downsamples": [True, True, False, False], "outlook_attention": [True, True, False, False]}
        | {"post_layers": ["ca"], "use_aux_head": False, "img_size": [45, 54]}
        | {"_stage_modules": ["patch_embed", "network.0", "network.1", "network.2", "network.3", "network.4"]},
        (45, 54),
    ),
    "volo_average": (
        {"post_layers": None, "global_pool": "avg", "layers": [1, 2], "embed_dims": [12, 16], "num_heads": [3, 2]}
        | {"img_size": 48, "mlp_ratio": 2, "in_chans": 1, "_stage_modules": ["network.2", "norm", "aux_head"]},
        (48, 48),
    ),
    # Nothing halved: positions stand before the third stage. Logits of all tokens.
    "volo_flat": (
        {"embed_dims": [16, 16, 16], "downsamples": [False, False, False], "pooling_scale": 1, "patch_size": 16}
        | {"outlook_attention": [False, True, True], "global_pool": "", "post_layers": [], "img_size": [80, 48]}
        | {"_stage_modules": ["network.0", "network.1", "network.2", "norm"]},
        (80, 48),
    ),
    "volo_features": (
        {"num_classes": 0, "post_layers": ["ca", "ca", "ca"], "img_size": [32, 64], "_stage_modules": ["norm"]},
        (32, 64),
    ),
}


def set_statistics(model: torch.nn.Module, x: torch.Tensor, generator: torch.Generator) -> None:
    """Running statistics of the input at each layer, then perturbed."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    with torch.no_grad():
        model(x)
    model.eval()
    for norm in norms:
        noise = torch.randn(norm.running_mean.shape, generator=generator)
        norm.running_mean += 0.1 * noise * norm.running_var.sqrt()
        norm.running_var *= 0.7 + 0.6 * torch.rand(norm.running_var.shape, generator=generator)


def main() -> None:
    """Writes one file per case."""
    for seed, (name, (options, size)) in enumerate(CASES.items()):
        config = SMALL | options
        arguments = {k: python_value(v) for k, v in config.items() if k != "cls" and k[0] != "_"}
        generator = torch.Generator().manual_seed(seed)
        model = VOLO(**arguments)
        randomize(model, generator)
        x = torch.randn(2, config.get("in_chans", 3), *size, generator=generator)
        set_statistics(model, x, generator)
        write(name, model, config, x)


if __name__ == "__main__":
    main()
