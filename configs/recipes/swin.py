"""Recipes of the Swin paper."""

from ml_collections import ConfigDict

from configs.recipes.common import from_scratch, imagenet_224, known_model

# Published rates, from scratch on ImageNet-1k.
SWIN_DROP_PATH = {"swin_tiny": 0.2, "swin_small": 0.3, "swin_base": 0.5}
# At 384 pixels: from ImageNet-1k at 224 pixels, and from ImageNet-22k.
SWIN_FINETUNED = {"swin_base_384": 0.5, "swin_large_384": 0.2}


def swin(config: ConfigDict, name: str) -> ConfigDict:
    """ImageNet-1k from scratch as for Swin (Liu et al. 2021, arXiv:2103.14030, section A2.1; the official code's
    configurations): 300 epochs, strong augmentation.

    Raises:
      ValueError: `name` has no published recipe.
    """
    from_scratch(config, name, SWIN_DROP_PATH, final_rate=1e-5, warmup="20 epochs", clip_norm=5.0)
    return config


def swin_finetune(config: ConfigDict, name: str) -> ConfigDict:
    """ImageNet-1k at 384 pixels from weights of 224 pixels (the official code's configurations, for 8 devices with 64
    images): 30 epochs, the augmentation of the first training. The official evaluation squeezes whole images into a
    square, this one crops its middle.

    Raises:
      ValueError: `name` has no published recipe.
    """
    known_model(name, SWIN_FINETUNED)
    config.model.name = name
    config.model.drop_path = SWIN_FINETUNED[name]
    imagenet_224(config)
    config.data.image_size = 384
    config.data.eval_transforms = "resize({size})|center_crop({size})|normalize"
    config.data.batch_size = 512
    config.optim.learning_rate = 2e-5
    config.optim.final_fraction = 2e-7 / 2e-5
    config.optim.weight_decay = 1e-8
    config.optim.warmup = "5 epochs"
    config.optim.clip_norm = 5.0
    config.train.steps = "30 epochs"
    config.task.options.label_smoothing = 0.1
    config.task.options.mixup = 0.8
    config.task.options.cutmix = 1.0
    return config
