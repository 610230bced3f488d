"""MaxViT-XLarge on ImageNet-1k at 384 pixels, from weights of ImageNet-21k at 224, or another size that way.

    python train.py --config=configs/maxvit_xlarge_384_imagenet.py --workdir=runs/maxvit_xlarge_384 \
        --config.model.init_from=maxvit_xlarge_tf_224.in21k.safetensors
    python train.py --config=configs/maxvit_xlarge_384_imagenet.py:maxvit_base_512 --workdir=runs/maxvit_base_512 \
        --config.model.init_from=maxvit_base_tf_224.in21k.safetensors

The classifier starts anew, and the tables of bias are resampled bilinearly. Needs imagenet2012 prepared as ArrayRecord
(docs/data.md) and the weights (docs/weights.md).

Cost: 475.3 M parameters, 291.5 G multiply-adds an image forward.
Expected: top-1 after 30 epochs (published, arXiv:2204.01697; not yet measured here): maxvit_xlarge_384 88.51%,
maxvit_xlarge_512 88.70%, maxvit_large_384 88.32%, maxvit_large_512 88.46%, maxvit_base_384 88.24%, maxvit_base_512
88.38%.
"""

from configs import base, recipes


def get_config(name="maxvit_xlarge_384"):
    """Returns the configuration; `name` is a model of base, large or xlarge for 384 or 512 pixels."""
    return recipes.maxvit_finetune(base.get_config(), name, pretrained="imagenet21k")
