"""A small DaViT on scikit-learn's digits: two stages of attention within windows and attention between channels.

    python train.py --config=configs/davit_digits.py --workdir=runs/davit_digits
    python train.py --config=configs/davit_digits.py --config.model.attention=identity --workdir=runs/davit_identity

The second command is the control, the same model whose layers have neither attention.

Cost: 0.25 M parameters, 5.6 M multiply-adds an image forward; about two minutes on two CPU cores.
Expected: depends on the seed; `python -m benchmarks.learning` measures it beside the other small models.
"""

from configs import base, recipes


def get_config():
    """Returns the configuration."""
    config = recipes.digits(base.get_config(), image_size=32)
    config.model.name = "davit_tiny"
    config.model.options = dict(widths=(32, 64), depths=(1, 2), heads=(2, 4), window=4)
    return config
