"""DiNAT_s-Tiny (Swin's layout) on ImageNet-1k at 224 pixels from scratch, or another DiNAT_s.

    python train.py --config=configs/dinat_s_tiny_imagenet.py --workdir=runs/dinat_s_tiny
    python train.py --config=configs/dinat_s_tiny_imagenet.py:dinat_s_small --workdir=runs/dinat_s_small

Needs imagenet2012 prepared as ArrayRecord (docs/data.md).

Cost: 28.3 M parameters, 4.5 G multiply-adds an image forward.
Expected: 81.8% top-1 after 300 epochs (published, arXiv:2209.15001); not yet measured here.
"""

from configs import base, recipes


def get_config(name="dinat_s_tiny"):
    """Returns the configuration; `name` is any of dinat_s_small, dinat_s_base, or the default."""
    return recipes.nat(base.get_config(), name)
