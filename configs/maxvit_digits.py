"""A small MaxViT on scikit-learn's digits: two stages of convolutions with block and grid attention, on a CPU.

    python train.py --config=configs/maxvit_digits.py --workdir=runs/maxvit_digits

Cost: 0.21 M parameters, 5.6 M multiply-adds an image forward.
Expected: 98.9% top-1 on the fixed 355 held-out images after 20 of the 60 epochs (measured once, seed 0).
"""

from configs import base, recipes


def get_config():
    """Returns the configuration."""
    config = recipes.digits(base.get_config(), image_size=32)
    config.model.name = "maxvit_tiny"
    # The official momentum of batch norms, 0.99, is for runs of many more steps: variances start at one.
    config.model.options = dict(
        widths=(24, 48),
        depths=(2, 2),
        stem_widths=8,
        head_width=8,
        window=4,
        pre_logits=48,
        convolution=dict(momentum=0.9),
    )
    return config
