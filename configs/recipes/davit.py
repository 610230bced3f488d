"""Recipe of the DaViT paper."""

from ml_collections import ConfigDict

from configs.recipes.common import imagenet_224

# From scratch on ImageNet-1k. The rate of Tiny is the official code's default.
DAVIT_DROP_PATH = {"davit_tiny": 0.1, "davit_small": 0.2, "davit_base": 0.4}


def davit(config: ConfigDict, name: str) -> ConfigDict:
    """ImageNet-1k from scratch as for DaViT (Ding et al. 2022, arXiv:2204.03645, section 4.1; the official code's
    defaults): 300 epochs, strong augmentation.

    The official run goes on at the last rate for 10 epochs, and lets drop path grow from layer to layer where here, as
    in timm, both layers of a pair have the same rate.

    Raises:
      ValueError: `name` has no published recipe.
    """
    if name not in DAVIT_DROP_PATH:
        raise ValueError(f"model {name!r}: there is a recipe for {', '.join(DAVIT_DROP_PATH)}")
    config.model.name = name
    config.model.drop_path = DAVIT_DROP_PATH[name]
    imagenet_224(config)
    config.data.eval_transforms = "resize({size/0.9})|center_crop({size})|normalize"
    config.data.batch_size = 1024
    config.optim.learning_rate = 1e-3
    config.optim.final_fraction = 1e-5 / 1e-3
    config.optim.weight_decay = 0.05
    config.optim.warmup = "5 epochs"
    config.optim.clip_norm = 1.0
    config.train.steps = "300 epochs"
    config.train.label_smoothing = 0.1
    config.train.mixup = 0.8
    config.train.cutmix = 1.0
    return config
