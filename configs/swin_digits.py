"""A small Swin on scikit-learn's digits: a stage of windows and shifted windows, and one of a single window.

    python train.py --config=configs/swin_digits.py --workdir=runs/swin_digits
    python train.py --config=configs/swin_digits.py --config.model.attention=identity --workdir=runs/swin_identity

The second command is the control, the same model whose tokens see themselves only.

Cost: 0.24 M parameters, 5.1 M multiply-adds an image forward; about two minutes on two CPU cores.
Expected: depends on the seed; docs/results.md has three, beside the other small models.
"""

from configs import base, recipes


def get_config():
    """Returns the configuration."""
    config = recipes.digits(base.get_config())
    config.model.name = "swin_tiny"
    config.model.options = dict(patch_size=2, width=32, depths=(2, 4), heads=(2, 4), window=4)
    return config
