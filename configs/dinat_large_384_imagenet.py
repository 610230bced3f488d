"""DiNAT-Large on ImageNet-1k at 384 pixels, from weights that were trained on ImageNet-22k at 224.

    python train.py --config=configs/dinat_large_384_imagenet.py --workdir=runs/dinat_large \
        --config.model.init_from=dinat_large_in22k_224.pth
    python train.py --config=configs/dinat_large_384_imagenet.py:dinat_large_11x11_384 \
        --workdir=runs/dinat_large_11x11 --config.model.init_from=dinat_large_in22k_224.pth

The classifier starts anew, dilations are those of the larger maps, and for a window of 11 the bias tables are
resampled. Needs imagenet2012 prepared as ArrayRecord (docs/data.md) and the official weights (docs/weights.md).

Cost: 200.9 M parameters, 89.5 G multiply-adds an image forward.
Expected: 87.4% top-1 after 30 epochs, 87.5% with a window of 11 (published, arXiv:2209.15001); not yet measured here.
"""

from configs import base, recipes


def get_config(name="dinat_large_384"):
    """Returns the configuration; `name` is dinat_large_11x11_384, dinat_s_large_384, or the default."""
    return recipes.nat_finetune(base.get_config(), name)
