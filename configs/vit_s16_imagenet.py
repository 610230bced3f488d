"""ViT-S/16 on ImageNet-1k at 224 pixels, by DeiT's recipe or big_vision's.

    python train.py --config=configs/vit_s16_imagenet.py --workdir=runs/vit_s16
    python train.py --config=configs/vit_s16_imagenet.py:big_vision --workdir=runs/vit_s16_bv

Needs imagenet2012 prepared as ArrayRecord (docs/data.md).

Cost: 22.1 M parameters, 4.6 G multiply-adds an image forward.
Expected: 79.8% top-1 after 300 epochs (published, DeiT table 5, arXiv:2012.12877); not yet measured here.
          76.5% after 90 epochs with big_vision (note in its vit_s16_i1k configuration); not yet measured here.
"""

from configs import base, recipes


def get_config(recipe="deit"):
    """Returns the configuration; `recipe` is "deit" or "big_vision"."""
    return recipes.imagenet(base.get_config(), "vit_s16", recipe)
