"""Recipes of plain Vision Transformers: DeiT's, big_vision's, and a small one for CIFAR."""

from ml_collections import ConfigDict

from configs.recipes.common import RANDAUGMENT

WIDTHS = {"vit_ti16": 192, "vit_s16": 384, "vit_b16": 768}


def deit(config: ConfigDict, image_size: int = 224, drop_path: float = 0.1) -> ConfigDict:
    """DeiT's ImageNet recipe (Touvron et al. 2021, arXiv:2012.12877, table 9 and the code's defaults): 300 epochs,
    strong augmentation.
    """
    config.model.drop_path = drop_path
    config.data.batch_size = 1024
    config.data.image_size = image_size
    config.data.train_transforms = f"random_resized_crop({{size}})|flip|{RANDAUGMENT}|normalize|erase(0.25)"
    config.data.eval_transforms = "resize({size/0.875})|center_crop({size})|normalize"
    config.data.repeats = 3
    config.data.on_error = "replace"
    config.data.workers = 8
    config.optim.name = "adamw"
    config.optim.learning_rate = 5e-4 * 1024 / 512
    config.optim.final_fraction = 0.01
    config.optim.weight_decay = 0.05
    config.optim.warmup = "5 epochs"
    config.optim.ema = 0.99996
    config.train.steps = "300 epochs"
    config.task.options.label_smoothing = 0.1
    config.task.options.mixup = 0.8
    config.task.options.cutmix = 1.0
    config.eval.use_ema = False
    config.train.precision = "bfloat16"
    config.checkpoint.every_steps = "1%"
    config.eval.every_steps = "5%"
    config.log.every_steps = 100
    return config


def big_vision(config: ConfigDict, image_size: int = 224) -> ConfigDict:
    """big_vision's plain-ViT baseline (Beyer et al. 2022, arXiv:2205.01580): 90 epochs, light augmentation, global
    average pooling.
    """
    config.model.options = dict(
        class_token=False,
        position="sincos2d",
        pool="avg",
        fc_norm=False,
        activation="gelu_tanh",
        pre_logits=WIDTHS[config.model.name],
        init="big_vision",
    )
    config.data.batch_size = 1024
    config.data.image_size = image_size
    config.data.train_transforms = (
        "random_resized_crop({size}, scale=(0.05, 1.0), interpolation='bilinear')|flip|randaugment(2, 10)|normalize"
    )
    config.data.eval_transforms = "resize({size/0.875}, interpolation='bilinear')|center_crop({size})|normalize"
    config.data.mean = config.data.std = (0.5, 0.5, 0.5)
    config.data.on_error = "replace"
    config.data.workers = 8
    config.optim.name = "adamw"
    config.optim.learning_rate = 1e-3
    # big_vision multiplies decay by the schedule but not by the rate: 1e-4 there is 1e-4 / 1e-3 here.
    config.optim.weight_decay = 0.1
    config.optim.weight_decay_on = "kernels"
    config.optim.mu_dtype = "bfloat16"
    config.optim.clip_norm = 1.0
    config.optim.warmup = 10_000
    config.train.steps = "90 epochs"
    config.task.options.mixup = 0.2
    config.train.precision = "bfloat16"
    config.checkpoint.every_steps = "1%"
    config.eval.every_steps = "5%"
    config.log.every_steps = 100
    return config


RECIPES = {"deit": deit, "big_vision": big_vision}


def imagenet(config: ConfigDict, name: str, recipe: str) -> ConfigDict:
    """ImageNet-1k with a model and one of the recipes by name.

    Raises:
      ValueError: no such recipe.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe {recipe!r}: there are {', '.join(RECIPES)}")
    config.model.name = name
    config.data.name = "imagenet2012"
    config.data.eval_split = "validation"
    return RECIPES[recipe](config)


def cifar(config: ConfigDict, name: str) -> ConfigDict:
    """A small ViT on CIFAR from scratch: patches of 4, crop with padding, RandAugment, mixup and CutMix."""
    config.model.name = "vit_ti16"
    config.model.options = dict(patch_size=4, pool="avg", class_token=False)
    config.model.drop_path = 0.1
    config.data.name = name
    config.data.image_size = 32
    config.data.batch_size = 512
    config.data.mean, config.data.std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    config.data.train_transforms = f"random_crop({{size}}, padding=4)|flip|{RANDAUGMENT}|normalize|erase(0.25)"
    config.data.eval_transforms = "resize({size})|center_crop({size})|normalize"
    config.data.workers = 2
    config.optim.learning_rate = 1e-3
    config.optim.weight_decay = 0.05
    config.optim.warmup = "10 epochs"
    config.optim.final_fraction = 0.01
    config.optim.clip_norm = 1.0
    config.train.steps = "200 epochs"
    config.task.options.label_smoothing = 0.1
    config.task.options.mixup = 0.8
    config.task.options.cutmix = 1.0
    config.checkpoint.every_steps = config.eval.every_steps = "10 epochs"
    return config
