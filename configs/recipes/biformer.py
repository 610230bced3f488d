"""The recipe of the BiFormer paper."""

from ml_collections import ConfigDict

from configs.recipes.common import known_model
from configs.recipes.vit import deit

# Those of Small and STL are in the official commands; Tiny has their default.
BIFORMER_DROP_PATH = {"biformer_tiny": 0.1, "biformer_small": 0.15, "biformer_base": 0.4, "biformer_stl": 0.1}


def biformer(config: ConfigDict, name: str) -> ConfigDict:
    """ImageNet-1k from scratch as for BiFormer (Zhu et al. 2023, arXiv:2303.08810; the official code's arguments): that
    of DeiT, with its repeated augmentation, for a batch of 1024.

    The official run goes on at the last rate for 10 epochs.

    Raises:
      ValueError: `name` has no published recipe.
    """
    known_model(name, BIFORMER_DROP_PATH)
    config.model.name = name
    config.data.name = "imagenet2012"
    config.data.eval_split = "validation"
    return deit(config, drop_path=BIFORMER_DROP_PATH[name])
