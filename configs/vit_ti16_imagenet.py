"""ViT-Ti/16 on ImageNet-1k at 224 pixels, by DeiT's recipe or big_vision's.

    python train.py --config=configs/vit_ti16_imagenet.py --workdir=runs/vit_ti16
    python train.py --config=configs/vit_ti16_imagenet.py:big_vision --workdir=runs/vit_ti16_bv

Needs imagenet2012 prepared as ArrayRecord (docs/data.md).

Cost: 5.7 M parameters, 1.25 G multiply-adds an image forward.
Expected: 72.2% top-1 after 300 epochs (published, DeiT table 5, arXiv:2012.12877); not yet measured here.
"""

from configs import base, recipes


def get_config(recipe="deit"):
    """Returns the configuration; `recipe` is "deit" or "big_vision"."""
    return recipes.imagenet(base.get_config(), "vit_ti16", recipe)
