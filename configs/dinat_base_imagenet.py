"""DiNAT-Base on ImageNet-1k at 224 pixels from scratch, or another DiNAT.

    python train.py --config=configs/dinat_base_imagenet.py --workdir=runs/dinat_base
    python train.py --config=configs/dinat_base_imagenet.py:dinat_mini --workdir=runs/dinat_mini

Needs imagenet2012 prepared as ArrayRecord (docs/data.md).

Cost: 89.8 M parameters, 13.7 G multiply-adds an image forward.
Expected: 84.4% top-1 after 300 epochs (published, arXiv:2209.15001); not yet measured here.
"""

from configs import base, recipes


def get_config(name="dinat_base"):
    """Returns the configuration; `name` is any of dinat_mini, dinat_tiny, dinat_small, or the default."""
    return recipes.nat(base.get_config(), name)
