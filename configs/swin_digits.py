"""A small Swin on scikit-learn's digits: three stages of windows, shifted where there are several.

    python train.py --config=configs/swin_digits.py --workdir=runs/swin_digits
    python train.py --config=configs/swin_digits.py --config.model.attention=identity --workdir=runs/swin_identity

The second command is the control, the same model whose tokens see themselves only. The first stage has 12 x 12 places
in four windows; patches are small, so that the control's places see no more than a third of a digit across.

Cost: 0.17 M parameters, 4.4 M multiply-adds an image forward; about three minutes as one of two runs on two CPU cores.
Expected: depends on the seed; docs/results.md has several, beside the other small models.
"""

from configs import base, recipes


def get_config():
    """Returns the configuration."""
    config = recipes.digits(base.get_config(), image_size=24)
    config.model.name = "swin_tiny"
    config.model.options = dict(patch_size=2, width=16, depths=(2, 4, 2), heads=(1, 2, 4), window=6)
    return config
