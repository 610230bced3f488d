"""A small VOLO on scikit-learn's digits: outlook attention on 8 x 8 places, dense attention on 4 x 4, token labels.

    python train.py --config=configs/volo_digits.py --workdir=runs/volo_digits
    python train.py --config=configs/volo_digits.py --config.model.attention=identity --workdir=runs/volo_identity

The second command is the control, the same model whose tokens see themselves only.

Cost: 0.25 M parameters, 4.5 M multiply-adds an image forward; about two minutes on two CPU cores.
Expected: depends on the seed; docs/results.md has several, beside the other small models.
"""

from configs import base, recipes


def get_config():
    """Returns the configuration."""
    config = recipes.digits(base.get_config())
    config.model.name = "volo_d1"
    config.model.options = dict(
        patch_size=2,
        stem_width=8,
        depths=(2, 4),
        widths=(32, 64),
        heads=(2, 4),
        downsamples=(True, False),
        outlook=(True, False),
        class_layers=1,
        dense=True,
        mix_token=False,  # two digits in one image are too much for 60 epochs of 1442
    )
    config.task.options.token_labels = 0.5
    return config
