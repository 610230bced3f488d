"""MaxViT-Tiny on ImageNet-1k at 384 pixels, from weights of 224, or another MaxViT at 384 or 512.

    python train.py --config=configs/maxvit_tiny_384_imagenet.py --workdir=runs/maxvit_tiny_384 \
        --config.model.init_from=runs/maxvit_tiny
    python train.py --config=configs/maxvit_tiny_384_imagenet.py:maxvit_base_512 --workdir=runs/maxvit_base_512 \
        --config.model.init_from=maxvit_base_tf_224.in1k.safetensors

Windows grow with the image, and the tables of bias are resampled bilinearly. Needs imagenet2012 prepared as ArrayRecord
(docs/data.md) and the weights (docs/weights.md).

Cost: 31.0 M parameters, 17.3 G multiply-adds an image forward.
Expected: top-1 after 30 epochs (published, arXiv:2204.01697; not yet measured here): maxvit_tiny_384 85.24%,
maxvit_tiny_512 85.72%, maxvit_small_384 85.74%, maxvit_small_512 86.19%, maxvit_base_384 86.34%, maxvit_base_512
86.66%, maxvit_large_384 86.40%, maxvit_large_512 86.70%.
"""

from configs import base, recipes


def get_config(name="maxvit_tiny_384"):
    """Returns the configuration; `name` is a model of tiny, small, base or large for 384 or 512 pixels."""
    return recipes.maxvit_finetune(base.get_config(), name)
