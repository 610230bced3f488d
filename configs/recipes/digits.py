"""A recipe for scikit-learn's digits, real images that need no download, and small models on a CPU."""

from ml_collections import ConfigDict


def digits(config: ConfigDict, image_size: int = 16) -> ConfigDict:
    """60 epochs of AdamW on 1442 digits, drawn larger to `image_size` and shifted by up to 2 pixels."""
    config.model.drop_path = 0.1
    config.data.name = "digits"
    config.data.image_size = image_size
    config.data.batch_size = 128
    config.data.mean, config.data.std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    config.data.train_transforms = "to_rgb|resize({size})|random_crop({size}, padding=2)|normalize"
    config.data.eval_transforms = "to_rgb|resize({size})|center_crop({size})|normalize"
    config.optim.learning_rate = 2e-3
    config.optim.weight_decay = 0.05
    config.optim.warmup = "10%"
    config.optim.clip_norm = 1.0
    config.optim.ema = 0.99
    config.train.steps = "60 epochs"
    config.task.options.label_smoothing = 0.1
    config.checkpoint.every_steps = config.eval.every_steps = "20%"
    config.log.every_steps = 25
    return config
