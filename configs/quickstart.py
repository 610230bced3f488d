"""A small ViT on scikit-learn's digits, real images that need no download, on a CPU.

    make train
    python train.py --config=configs/quickstart.py --workdir=runs/quickstart

Cost: 0.3 M parameters, 5.0 M multiply-adds an image forward; two minutes on two CPU cores.
Expected: 97.7% to 99.4% top-1 on the fixed 355 held-out images (measured over 5 seeds: docs/benchmarks.md).
"""

from configs import base


def get_config():
    """Returns the configuration."""
    config = base.get_config()
    config.model.name = "vit_mu16"
    config.model.options = dict(patch_size=4, width=64, depth=6, heads=4, mlp_width=256, pool="avg", class_token=False)
    config.model.drop_path = 0.1
    config.data.name = "digits"
    config.data.image_size = 16
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
    config.train.label_smoothing = 0.1
    config.checkpoint.every_steps = config.eval.every_steps = "20%"
    config.log.every_steps = 25
    return config
