"""A small BiFormer on scikit-learn's digits: a stage of bi-level routing and one of dense attention, on a CPU.

    python train.py --config=configs/biformer_digits.py --workdir=runs/biformer_digits
    python train.py --config=configs/biformer_digits.py --workdir=runs/none --config.model.attention=identity

The second command is the control, the same model whose tokens see themselves only. On the first stage's 8 x 8 places
each of 16 regions is routed to 4. In the layout of Swin, because the other one's convolutions see a whole digit without
any attention.

Cost: 0.21 M parameters, 4.6 M multiply-adds an image forward; about two minutes on two CPU cores.
Expected: depends on the seed; docs/results.md has several, beside the other small models.
"""

from configs import base, recipes


def get_config():
    """Returns the configuration."""
    config = recipes.digits(base.get_config(), image_size=32)
    config.model.name = "biformer_stl"
    config.model.options = dict(widths=(32, 64), depths=(2, 4), heads=(2, 4), mlp_ratio=3, regions=4, topk=(4, 0))
    return config
