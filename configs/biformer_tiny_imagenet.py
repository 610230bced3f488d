"""BiFormer-T on ImageNet-1k at 224 pixels from scratch, or another BiFormer.

    python train.py --config=configs/biformer_tiny_imagenet.py --workdir=runs/biformer_tiny
    python train.py --config=configs/biformer_tiny_imagenet.py:biformer_small --workdir=runs/biformer_small

Needs imagenet2012 prepared as ArrayRecord (docs/data.md).

Cost: 13.1 M parameters, 2.2 G multiply-adds an image forward (Small 4.5 G, Base 9.8 G, STL 4.6 G).
Expected: 81.4% top-1 after 300 epochs (published, arXiv:2303.08810; Small 83.8%, Base 84.3%, STL 82.7%); not yet
measured here.
"""

from configs import base, recipes


def get_config(name="biformer_tiny"):
    """Returns the configuration; `name` is any of biformer_small, biformer_base, biformer_stl, or the default."""
    return recipes.biformer(base.get_config(), name)
