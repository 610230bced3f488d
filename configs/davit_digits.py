"""A small DaViT on scikit-learn's digits: two stages of attention within windows and attention between channels.

    python train.py --config=configs/davit_digits.py --workdir=runs/davit_digits
    python train.py --config=configs/davit_digits.py --config.model.attention=identity --workdir=runs/davit_identity

The second command is the control, the same model whose layers have neither attention. Digits are drawn large and the
blocks have no convolutions for positions, because these see a whole digit without any attention: at 32 pixels, and with
them, the control is as good as the model.

Cost: 0.14 M parameters, 15.1 M multiply-adds an image forward; four to five minutes as one of two runs
on two CPU cores.
Expected: depends on the seed; docs/results.md has several, beside the other small models.
"""

from configs import base, recipes


def get_config():
    """Returns the configuration."""
    config = recipes.digits(base.get_config(), image_size=64)
    config.model.name = "davit_tiny"
    config.model.options = dict(widths=(32, 64), depths=(1, 1), heads=(2, 4), window=4, positions=False)
    config.train.steps = "40 epochs"
    return config
