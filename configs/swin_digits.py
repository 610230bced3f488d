"""A small Swin on scikit-learn's digits: three stages of windows, shifted where there are several.

    python train.py --config=configs/swin_digits.py --workdir=runs/swin_digits
    python train.py --config=configs/swin_digits.py --config.model.attention=identity --workdir=runs/swin_identity

The second command is the control, the same model whose tokens see themselves only.

Cost: 0.38 M parameters, 3.9 M multiply-adds an image forward; about two minutes on two CPU cores.
Expected: depends on the seed; docs/results.md has several, beside the other small models.
"""

from configs import base, recipes


def get_config():
    """Returns the configuration."""
    config = recipes.digits(base.get_config())
    config.model.name = "swin_tiny"
    config.model.options = dict(patch_size=2, width=24, depths=(2, 4, 2), heads=(2, 4, 8), window=4)
    return config
