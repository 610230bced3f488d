"""Swin-Large on ImageNet-1k at 384 pixels, from weights that were trained on ImageNet-22k, or Swin-Base.

    python train.py --config=configs/swin_large_384_imagenet.py --workdir=runs/swin_large \
        --config.model.init_from=swin_large_patch4_window12_384_22k.pth
    python train.py --config=configs/swin_large_384_imagenet.py:swin_base_384 --workdir=runs/swin_base_384 \
        --config.model.init_from=swin_base_patch4_window7_224.pth

The classifier starts anew where the classes are others, and bias tables for windows of 7 are resampled to those of 12.
Needs imagenet2012 prepared as ArrayRecord (docs/data.md) and the official weights (docs/weights.md).

Cost: 196.7 M parameters, 103.9 G multiply-adds an image forward.
Expected: 87.3% top-1 after 30 epochs; 84.5% of swin_base_384 from ImageNet-1k, 86.4% from ImageNet-22k, for which
drop path is 0.2 (published, arXiv:2103.14030); not yet measured here.
"""

from configs import base, recipes


def get_config(name="swin_large_384"):
    """Returns the configuration; `name` is swin_base_384 or the default."""
    return recipes.swin_finetune(base.get_config(), name)
