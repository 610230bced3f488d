"""NAT-Tiny on ImageNet-1k at 224 pixels from scratch, or another NAT.

    python train.py --config=configs/nat_tiny_imagenet.py --workdir=runs/nat_tiny
    python train.py --config=configs/nat_tiny_imagenet.py:nat_mini --workdir=runs/nat_mini

Needs imagenet2012 prepared as ArrayRecord (docs/data.md).

Cost: 27.9 M parameters, 4.3 G multiply-adds an image forward.
Expected: 83.2% top-1 after 300 epochs (published, arXiv:2204.07143); not yet measured here.
"""

from configs import base, recipes


def get_config(name="nat_tiny"):
    """Returns the configuration; `name` is any of nat_mini, nat_small, nat_base, or the default."""
    return recipes.nat(base.get_config(), name)
