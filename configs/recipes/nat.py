"""Recipes of the NAT papers."""

from ml_collections import ConfigDict

from configs.recipes.common import from_scratch, imagenet_224

# Published rates of the NAT papers' models, trained on ImageNet-1k from scratch.
NAT_DROP_PATH = {
    **dict.fromkeys(("nat_mini", "nat_tiny", "dinat_mini", "dinat_tiny", "dinat_s_tiny"), 0.2),
    **dict.fromkeys(("nat_small", "dinat_small", "dinat_s_small"), 0.3),
    **dict.fromkeys(("nat_base", "dinat_base", "dinat_s_base"), 0.5),
    **dict.fromkeys(("nat_iso_s", "dinat_iso_s", "vitrpb_s"), 0.1),
    **dict.fromkeys(("nat_iso_b", "dinat_iso_b", "vitrpb_b"), 0.4),
}


def nat(config: ConfigDict, name: str) -> ConfigDict:
    """ImageNet-1k from scratch as for NAT, DiNAT, DiNAT_s and the isotropic models (Hassani et al. 2022, 2023,
    arXiv:2204.07143 and 2209.15001; the official code's configurations): 300 epochs, strong augmentation.

    The official run resizes crops by a random choice of bilinear and bicubic, here bicubic, and goes on at the last
    rate for 10 epochs.

    Raises:
      ValueError: `name` has no published recipe.
    """
    from_scratch(config, name, NAT_DROP_PATH, final_rate=5e-6, warmup="20 epochs", clip_norm=5.0)
    if name in ("nat_iso_b", "dinat_iso_b", "vitrpb_b"):
        config.optim.warmup = "50 epochs"
        config.optim.ema = 0.9998
    return config


def nat_finetune(config: ConfigDict, name: str) -> ConfigDict:
    """ImageNet-1k at 384 pixels from weights of ImageNet-22k, as for DiNAT-Large (arXiv:2209.15001; the official code's
    configurations, for 8 devices with 64 images): 30 epochs, no mixing of images.
    """
    config.model.name = name
    config.model.drop_path = 0.35
    imagenet_224(config)
    config.data.image_size = 384
    config.data.eval_transforms = "resize({size})|center_crop({size})|normalize"
    config.data.batch_size = 512
    config.optim.learning_rate = 5e-5
    config.optim.schedule = "linear"
    config.optim.final_fraction = 5e-6 / 5e-5
    config.optim.weight_decay = 1e-5 if name.startswith("dinat_s") else 1e-10
    config.optim.warmup = 0
    config.optim.clip_norm = 5.0
    config.train.steps = "30 epochs"
    config.task.options.label_smoothing = 0.1
    return config
