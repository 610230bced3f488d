"""Recipes of the MaxViT paper (arXiv:2204.01697, appendix, and google-research/maxvit)."""

from ml_collections import ConfigDict

from configs.recipes.common import imagenet_224, known_model

# Published rates of models trained on ImageNet-1k, at 224 pixels and at every other size after that.
MAXVIT_DROP_PATH = {"maxvit_tiny": 0.2, "maxvit_small": 0.3, "maxvit_base": 0.4, "maxvit_large": 0.6}
# And of those that come from ImageNet-21k.
MAXVIT_21K_DROP_PATH = {"maxvit_base": 0.4, "maxvit_large": 0.5, "maxvit_xlarge": 0.9}
SIDES = (384, 512)


def maxvit(config: ConfigDict, name: str) -> ConfigDict:
    """ImageNet-1k at 224 pixels from scratch: 300 epochs, RandAugment and mixup, no CutMix.

    The official RandAugment goes to magnitude 15 of 10; here the largest change is that of 10.

    Raises:
      ValueError: `name` has no published recipe.
    """
    known_model(name, MAXVIT_DROP_PATH)
    config.model.name = name
    config.model.drop_path = MAXVIT_DROP_PATH[name]
    _common(config)
    config.data.batch_size = 4096
    config.optim.learning_rate = 3e-3
    config.optim.final_fraction = 1e-5 / 3e-3
    config.optim.weight_decay = 0.05
    config.optim.warmup = 10_000
    config.train.steps = "300 epochs"
    return config


def maxvit_finetune(config: ConfigDict, name: str, pretrained: str = "imagenet1k") -> ConfigDict:
    """ImageNet-1k at 384 or 512 pixels from weights of 224: 30 epochs at a constant rate, whole images, no crop, in
    evaluation.

    Args:
      pretrained: `"imagenet1k"` or `"imagenet21k"`, which the weights were trained on; drop path depends on it.

    Raises:
      ValueError: `name` has no published recipe.
    """
    rates = {"imagenet1k": MAXVIT_DROP_PATH, "imagenet21k": MAXVIT_21K_DROP_PATH}[pretrained]
    known_model(name, [f"{size}_{side}" for size in rates for side in SIDES])
    size, _, side = name.rpartition("_")
    config.model.name = name
    config.model.drop_path = rates[size]
    _common(config)
    config.data.image_size = int(side)
    config.data.mean = config.data.std = (0.5, 0.5, 0.5)
    config.data.eval_transforms = "resize(({size}, {size}))|normalize"
    config.data.batch_size = 512
    config.optim.learning_rate = 5e-5
    config.optim.schedule = "constant"
    config.optim.weight_decay = 1e-8
    config.optim.warmup = 0
    config.train.steps = "30 epochs"
    return config


def _common(config: ConfigDict) -> None:
    imagenet_224(config)
    config.data.train_transforms = "random_resized_crop({size})|flip|randaugment(2, 15)|normalize"
    config.optim.clip_norm = 1.0
    config.optim.ema = 0.9999
    config.task.options.label_smoothing = 0.1
    config.task.options.mixup = 0.8
