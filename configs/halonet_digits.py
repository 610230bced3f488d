"""A small HaloNet on scikit-learn's digits: two stages of bottleneck blocks with halo attention, on a CPU.

    python train.py --config=configs/halonet_digits.py --workdir=runs/halonet_digits
    python train.py --config=configs/halonet_digits.py --config.model.attention=identity --workdir=runs/halonet_identity

The second command is the control, the same model whose attention layers see one place only.

Cost: 0.042 M parameters, 5.0 M multiply-adds an image forward.
Expected: depends on the seed; docs/results.md has several, beside the other small models.
"""

from configs import base, recipes


def get_config():
    """Returns the configuration."""
    config = recipes.digits(base.get_config(), image_size=32)
    config.model.name = "halonet_h1"
    config.model.options = dict(
        stem=(16,),
        stem_size=3,
        stem_pool=None,
        widths=(16, 40),
        depths=(2, 3),
        strides=(1, 2),
        layers=(("attention",), ("attention",)),
        heads=4,
        block_size=4,
        halo_size=1,
        features=256,
    )
    return config
