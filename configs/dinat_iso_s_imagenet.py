"""Isotropic DiNAT-Small on ImageNet-1k at 224 pixels from scratch, or another isotropic model.

    python train.py --config=configs/dinat_iso_s_imagenet.py --workdir=runs/dinat_iso_s
    python train.py --config=configs/dinat_iso_s_imagenet.py:vitrpb_s --workdir=runs/vitrpb_s

Needs imagenet2012 prepared as ArrayRecord (docs/data.md).

Cost: 22.0 M parameters, 4.3 G multiply-adds an image forward.
Expected: 80.8% top-1 after 300 epochs (published, arXiv:2209.15001); not yet measured here.
"""

from configs import base, recipes


def get_config(name="dinat_iso_s"):
    """Returns the configuration; `name` is nat_iso_, dinat_iso_ or vitrpb_ with s or b."""
    return recipes.nat(base.get_config(), name)
