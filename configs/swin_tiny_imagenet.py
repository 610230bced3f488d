"""Swin-Tiny on ImageNet-1k at 224 pixels from scratch, or Swin-Small or Swin-Base.

    python train.py --config=configs/swin_tiny_imagenet.py --workdir=runs/swin_tiny
    python train.py --config=configs/swin_tiny_imagenet.py:swin_base --workdir=runs/swin_base

Needs imagenet2012 prepared as ArrayRecord (docs/data.md).

Cost: 28.3 M parameters, 4.5 G multiply-adds an image forward.
Expected: 81.3% top-1 after 300 epochs, 83.0% of swin_small, 83.5% of swin_base (published, arXiv:2103.14030; the
published weights have 81.2, 83.2 and 83.5%); not yet measured here.
"""

from configs import base, recipes


def get_config(name="swin_tiny"):
    """Returns the configuration; `name` is swin_small, swin_base, or the default."""
    return recipes.swin(base.get_config(), name)
