"""A small MaxViT on scikit-learn's digits: two stages of convolutions with block and grid attention, on a CPU.

    python train.py --config=configs/maxvit_digits.py --workdir=runs/maxvit_digits
    python train.py --config=configs/maxvit_digits.py --config.model.attention=identity --workdir=runs/maxvit_identity

The second command is the control, the same model whose layers have neither attention. The convolutions of its layers
see one place (`size=1`) and have no squeeze-excite, since either mixes places without any attention, and a digit is 64
pixels wide, of which the stem and the downsampling see 13.

Cost: 0.074 M parameters, 8.4 M multiply-adds an image forward; about eight minutes as one of two runs on two CPU cores.
Expected: depends on the seed; docs/results.md has several, beside the other small models.
"""

from configs import base, recipes


def get_config():
    """Returns the configuration."""
    config = recipes.digits(base.get_config(), image_size=64)
    config.model.name = "maxvit_tiny"
    config.model.drop_path = 0.0
    # The official normal distribution of deviation 0.02 is for wide layers; these learn slowly from it.
    # The official momentum of batch norms, 0.99, is for runs of many more steps: variances start at one.
    config.model.options = dict(
        widths=(16, 32),
        depths=(1, 2),
        stem_widths=8,
        head_width=8,
        window=8,
        pre_logits=32,
        init="big_vision",
        convolution=dict(size=1, expansion=2, stride_at="pool", gate_at="none", momentum=0.9),
    )
    return config
