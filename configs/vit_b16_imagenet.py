"""ViT-B/16 on ImageNet-1k at 224 pixels, by DeiT's recipe or big_vision's.

    python train.py --config=configs/vit_b16_imagenet.py --workdir=runs/vit_b16
    python train.py --config=configs/vit_b16_imagenet.py:big_vision --workdir=runs/vit_b16_bv

Needs imagenet2012 prepared as ArrayRecord (docs/data.md).

Cost: 86.6 M parameters, 17.6 G multiply-adds an image forward.
Expected: 81.8% top-1 after 300 epochs (published, DeiT table 5, arXiv:2012.12877); not yet measured here.
"""

from configs import base, recipes


def get_config(recipe="deit"):
    """Returns the configuration; `recipe` is "deit" or "big_vision"."""
    return recipes.imagenet(base.get_config(), "vit_b16", recipe)
