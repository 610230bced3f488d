"""MaxViT-Tiny on ImageNet-1k at 224 pixels from scratch, or another MaxViT.

    python train.py --config=configs/maxvit_tiny_imagenet.py --workdir=runs/maxvit_tiny
    python train.py --config=configs/maxvit_tiny_imagenet.py:maxvit_base --workdir=runs/maxvit_base

Needs imagenet2012 prepared as ArrayRecord (docs/data.md).

Cost: 30.9 M parameters, 5.5 G multiply-adds an image forward.
Expected: 83.62% top-1 after 300 epochs; maxvit_small 84.45%, maxvit_base 84.95%, maxvit_large 85.17% (published,
arXiv:2204.01697); not yet measured here.
"""

from configs import base, recipes


def get_config(name="maxvit_tiny"):
    """Returns the configuration; `name` is any of maxvit_small, maxvit_base, maxvit_large, or the default."""
    return recipes.maxvit(base.get_config(), name)
