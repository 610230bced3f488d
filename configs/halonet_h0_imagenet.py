"""HaloNet-H0 on ImageNet-1k at 256 pixels from scratch, or another of the paper's, H1 to H7, at its own size.

    python train.py --config=configs/halonet_h0_imagenet.py --workdir=runs/halonet_h0
    python train.py --config=configs/halonet_h0_imagenet.py:halonet_h4 --workdir=runs/halonet_h4

Needs imagenet2012 prepared as ArrayRecord (docs/data.md).

Cost: 5.5 M parameters, 2.3 G multiply-adds an image forward.
Expected: 77.9% top-1 after 350 epochs; halonet_h1 79.9%, halonet_h2 80.4%, halonet_h3 81.9% at 320 pixels, halonet_h4
83.3% at 384, halonet_h5 84.0% at 448, halonet_h6 84.4% at 512, halonet_h7 84.9% at 600 (published, arXiv:2103.12731);
not yet measured here.
"""

from configs import base, recipes


def get_config(name="halonet_h0"):
    """Returns the configuration; `name` is any of halonet_h1 to halonet_h7, or the default."""
    return recipes.halonet(base.get_config(), name)
