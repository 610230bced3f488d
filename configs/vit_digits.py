"""A small ViT on scikit-learn's digits: the model that the small models of other families are compared with.

    python train.py --config=configs/vit_digits.py --workdir=runs/vit_digits

Cost: 0.3 M parameters, 5.0 M multiply-adds an image forward; two minutes on two CPU cores.
Expected: 97.7% to 99.4% top-1 on the fixed 355 held-out images (measured over 5 seeds: docs/benchmarks.md).
"""

from configs import base, recipes


def get_config():
    """Returns the configuration."""
    config = recipes.digits(base.get_config())
    config.model.name = "vit_mu16"
    config.model.options = dict(patch_size=4, width=64, depth=6, heads=4, mlp_width=256, pool="avg", class_token=False)
    return config
