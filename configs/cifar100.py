"""A ViT-Ti with patches of 4 pixels on CIFAR-100, from scratch.

    python train.py --config=configs/cifar100.py --workdir=runs/cifar100

Needs cifar100 prepared as ArrayRecord (docs/data.md).

Cost: 5.4 M parameters, 0.36 G multiply-adds an image forward.
Expected: no published number for this recipe; not yet measured here.
"""

from configs import base, recipes


def get_config():
    """Returns the configuration."""
    return recipes.cifar(base.get_config(), "cifar100")
