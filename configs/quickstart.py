"""A small NAT on scikit-learn's digits, real images that need no download: two stages of neighborhood attention, on a
CPU.

    make train
    python train.py --config=configs/quickstart.py --workdir=runs/quickstart

Cost: 0.21 M parameters, 1.5 M multiply-adds an image forward; about a minute on two CPU cores.
Expected: 97.5% to 98.3% top-1 on the fixed 355 held-out images (measured over 5 seeds: docs/benchmarks.md).
"""

from configs import base, recipes


def get_config():
    """Returns the configuration."""
    config = recipes.digits(base.get_config())
    config.model.name = "nat_mini"
    config.model.options = dict(width=32, depths=(2, 4), heads=(2, 4), window=3)
    return config
