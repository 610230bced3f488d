"""What published recipes have in common."""

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
