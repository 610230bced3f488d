"""What published recipes have in common."""

from collections.abc import Collection, Mapping

from ml_collections import ConfigDict

# timm's rand-m9-mstd0.5-inc1, which DeiT uses.
RANDAUGMENT = "randaugment(2, 9, std=0.5, probability=0.5, increasing=True)"


def imagenet_224(config: ConfigDict) -> None:
    """ImageNet-1k at 224 pixels with DeiT's augmentation of single images, AdamW, bfloat16."""
    config.data.name = "imagenet2012"
    config.data.eval_split = "validation"
    config.data.image_size = 224
    config.data.train_transforms = f"random_resized_crop({{size}})|flip|{RANDAUGMENT}|normalize|erase(0.25)"
    config.data.eval_transforms = "resize({size/0.875})|center_crop({size})|normalize"
    config.data.on_error = "replace"
    config.data.workers = 8
    config.optim.name = "adamw"
    config.train.precision = "bfloat16"
    config.checkpoint.every_steps = "1%"
    config.eval.every_steps = "5%"
    config.log.every_steps = 100


def known_model(name: str, recipes: Collection[str]) -> None:
    """ValueError for a model that these recipes are not for."""
    if name not in recipes:
        raise ValueError(f"model {name!r}: there is a recipe for {', '.join(sorted(recipes))}")


def from_scratch(
    config: ConfigDict,
    name: str,
    drop_path: Mapping[str, float],
    *,
    final_rate: float,
    warmup: str,
    clip_norm: float,
) -> None:
    """Swin's recipe for ImageNet-1k from scratch (arXiv:2103.14030, section A2.1), which many papers after it keep but
    for the last rate, the warm-up and the clipping: 300 epochs, batches of 1024, strong augmentation.

    Args:
      drop_path: the published rate of each model.

    Raises:
      ValueError: `name` has no published recipe.
    """
    known_model(name, drop_path)
    config.model.name = name
    config.model.drop_path = drop_path[name]
    imagenet_224(config)
    config.data.batch_size = 1024
    config.optim.learning_rate = 1e-3
    config.optim.final_fraction = final_rate / 1e-3
    config.optim.weight_decay = 0.05
    config.optim.warmup = warmup
    config.optim.clip_norm = clip_norm
    config.train.steps = "300 epochs"
    config.task.options.label_smoothing = 0.1
    config.task.options.mixup = 0.8
    config.task.options.cutmix = 1.0
