"""VOLO-D1 on ImageNet-1k at 224 pixels from scratch, or VOLO-D2 to VOLO-D5.

    python train.py --config=configs/volo_d1_imagenet.py --workdir=runs/volo_d1
    python train.py --config=configs/volo_d1_imagenet.py:volo_d3 --workdir=runs/volo_d3

Every token learns the label of its image; with `--config.task.options.teacher=runs/TEACHER`, what a trained model with
a head for its tokens says (docs/families/volo.md). Needs imagenet2012 prepared as ArrayRecord (docs/data.md).

Cost: 26.6 M parameters, 6.9 G multiply-adds an image forward.
Expected: 84.2% top-1 after 300 epochs, 85.2% of volo_d2, 85.4% of volo_d3, 85.7% of volo_d4, 86.1% of volo_d5
(published with token labels from an NFNet-F6, arXiv:2106.13112); not yet measured here.
"""

from configs import base, recipes


def get_config(name="volo_d1"):
    """Returns the configuration; `name` is volo_d2, volo_d3, volo_d4, volo_d5, or the default."""
    return recipes.volo(base.get_config(), name)
