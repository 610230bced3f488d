"""A ViT-Ti with patches of 4 pixels on CIFAR-10, from scratch.

    python train.py --config=configs/cifar10.py --workdir=runs/cifar10

Needs cifar10 prepared as ArrayRecord (docs/data.md).

Cost: 5.4 M parameters, 0.36 G multiply-adds an image forward.
Expected: no published number for this recipe; not yet measured here.
"""

from configs import base, recipes


def get_config():
    """Returns the configuration."""
    return recipes.cifar(base.get_config(), "cifar10")
