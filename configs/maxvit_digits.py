"""A small MaxViT on scikit-learn's digits: two stages of convolutions with block and grid attention, on a CPU.

    python train.py --config=configs/maxvit_digits.py --workdir=runs/maxvit_digits
    python train.py --config=configs/maxvit_digits.py --config.model.attention=identity --workdir=runs/maxvit_identity

The second command is the control, the same model whose layers have neither attention. The convolutions of its layers
see one place (`size=1`) and have no squeeze-excite: either mixes places without any attention.

Cost: 0.192 M parameters, 5.5 M multiply-adds an image forward; 4 to 5 minutes as one of two runs on two CPU cores.
Expected: depends on the seed; docs/results.md has several, beside the other small models.
"""

from configs import base, recipes


def get_config():
    """Returns the configuration."""
    config = recipes.digits(base.get_config(), image_size=32)
    config.model.name = "maxvit_tiny"
    # The official normal distribution of deviation 0.02 is for wide layers; these learn slowly from it.
    # The official momentum of batch norms, 0.99, is for runs of many more steps: variances start at one.
    config.model.options = dict(
        widths=(24, 48),
        depths=(2, 2),
        stem_widths=8,
        head_width=8,
        window=4,
        pre_logits=48,
        init="big_vision",
        convolution=dict(size=1, gate_at="none", momentum=0.9),
    )
    return config
