"""timm's HaloNet-50-ts on ImageNet-1k at 256 pixels from scratch, or another ResNet with halo attention of timm's.

    python train.py --config=configs/halonet_50ts_imagenet.py --workdir=runs/halonet50ts
    python train.py --config=configs/halonet_50ts_imagenet.py:haloregnetz_b --workdir=runs/haloregnetz_b

Needs imagenet2012 prepared as ArrayRecord (docs/data.md).

Cost: 22.7 M parameters, 5.3 G multiply-adds an image forward.
Expected: 81.64% top-1; halonet26t 79.13%, sehalonet33ts 80.98%, eca_halonext26ts 79.5%, halo2botnet50ts 82.08%, and
haloregnetz_b 81.06% at 224 pixels (timm's, whose own recipes differ as `configs/recipes/halonet.py` says); not yet
measured here.
"""

from configs import base, recipes


def get_config(name="halonet50ts"):
    """Returns the configuration; `name` is any of halonet26t, sehalonet33ts, eca_halonext26ts, haloregnetz_b,
    halo2botnet50ts, or the default.
    """
    return recipes.halonet_hybrid(base.get_config(), name)
