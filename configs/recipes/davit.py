"""Recipe of the DaViT paper."""

from ml_collections import ConfigDict

from configs.recipes.common import from_scratch

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
    from_scratch(config, name, DAVIT_DROP_PATH, final_rate=1e-5, warmup="5 epochs", clip_norm=1.0)
    config.data.eval_transforms = "resize({size/0.9})|center_crop({size})|normalize"
    return config
