"""VOLO-D1 on ImageNet-1k at 384 pixels, from weights of 224 pixels, or a larger VOLO at 384, 448 or 512 pixels.

    python train.py --config=configs/volo_d1_384_imagenet.py --workdir=runs/volo_d1_384 \
        --config.model.init_from=d1_224_84.2.pth.tar
    python train.py --config=configs/volo_d1_384_imagenet.py:volo_d5_512 --workdir=runs/volo_d5_512 \
        --config.model.init_from=d5_224_86.10.pth.tar

Positions are resampled to the larger map. Needs imagenet2012 prepared as ArrayRecord (docs/data.md) and the official
weights (docs/weights.md), or a run at 224 pixels.

Cost: 26.8 M parameters, 22.7 G multiply-adds an image forward.
Expected: 85.2% top-1 after 30 epochs, 86.0% of volo_d2_384, 86.3% of volo_d3_448, 86.8% of volo_d4_448, 87.0% of
volo_d5_448, 87.1% of volo_d5_512 (published, arXiv:2106.13112); not yet measured here.
"""

from configs import base, recipes


def get_config(name="volo_d1_384"):
    """Returns the configuration; `name` is volo_d2_384, volo_d3_448, volo_d4_448, volo_d5_448, volo_d5_512, or the
    default.
    """
    return recipes.volo_finetune(base.get_config(), name)
