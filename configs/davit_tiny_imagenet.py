"""DaViT-Tiny on ImageNet-1k at 224 pixels from scratch, or DaViT-Small or DaViT-Base.

    python train.py --config=configs/davit_tiny_imagenet.py --workdir=runs/davit_tiny
    python train.py --config=configs/davit_tiny_imagenet.py:davit_base --workdir=runs/davit_base

Needs imagenet2012 prepared as ArrayRecord (docs/data.md).

Cost: 28.4 M parameters, 4.5 G multiply-adds an image forward.
Expected: 82.8% top-1 after 300 epochs, 84.2% of davit_small, 84.6% of davit_base (published, arXiv:2204.03645); not
yet measured here.
"""

from configs import base, recipes


def get_config(name="davit_tiny"):
    """Returns the configuration; `name` is davit_small, davit_base, or the default."""
    return recipes.davit(base.get_config(), name)
