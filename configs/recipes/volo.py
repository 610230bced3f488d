"""Recipes of the VOLO paper."""

from ml_collections import ConfigDict

from configs.recipes.common import imagenet_224, known_model

# Published rates, from scratch on ImageNet-1k at 224 pixels and for larger images.
VOLO_DROP_PATH = {"volo_d1": 0.1, "volo_d2": 0.2, "volo_d3": 0.5, "volo_d4": 0.5, "volo_d5": 0.75}
# Image size, and the part of the evaluation's image that is seen: more than 1 is padded.
VOLO_FINETUNED = {
    "volo_d1_384": (384, 1.0),
    "volo_d2_384": (384, 1.0),
    "volo_d3_448": (448, 1.0),
    "volo_d4_448": (448, 1.15),
    "volo_d5_448": (448, 1.15),
    "volo_d5_512": (512, 1.15),
}


def volo(config: ConfigDict, name: str) -> ConfigDict:
    """ImageNet-1k from scratch as for VOLO (Yuan et al. 2021, arXiv:2106.13112, section 4.1; the official repository's
    commands): 300 epochs with token labels and mix-token, no other mixing of images and no clipping of gradients.

    The official run takes token labels from an NFNet-F6, written down beforehand. Here every token has the label of its
    image, or what a teacher says of it: `config.task.options.teacher`, a trained model with a head for its tokens. The
    official run resizes crops by a random choice of bilinear and bicubic, here bicubic, and goes on at the last rate
    for 10 epochs. D4 and D5 have no command there; they are given D2's.

    Raises:
      ValueError: `name` has no published recipe.
    """
    known_model(name, VOLO_DROP_PATH)
    _token_labels(config, name)
    config.data.eval_transforms = "resize({size/0.96})|center_crop({size})|normalize"
    config.data.batch_size = 1024
    config.optim.learning_rate = 1.6e-3 if name == "volo_d1" else 1e-3
    config.optim.final_fraction = 1e-5 / config.optim.learning_rate
    config.optim.weight_decay = 0.05
    config.optim.warmup = "20 epochs"
    config.train.steps = "300 epochs"
    return config


def volo_finetune(config: ConfigDict, name: str) -> ConfigDict:
    """ImageNet-1k at a larger size from weights of 224 pixels, as for VOLO (the official repository's commands, for 8
    devices with 64 images): 30 epochs at a low rate, otherwise as from scratch.

    Raises:
      ValueError: `name` has no published recipe.
    """
    known_model(name, VOLO_FINETUNED)
    size, part = VOLO_FINETUNED[name]
    _token_labels(config, name)
    config.data.image_size = size
    config.data.eval_transforms = f"resize({{size/{part}}})|center_crop({{size}})|normalize"
    config.data.batch_size = 512
    config.optim.learning_rate = 8e-6
    config.optim.final_fraction = 4e-6 / 8e-6
    config.optim.weight_decay = 1e-8
    config.optim.warmup = "5 epochs"
    config.train.steps = "30 epochs"
    return config


def _token_labels(config: ConfigDict, name: str) -> None:
    config.model.name = name
    config.model.drop_path = VOLO_DROP_PATH["_".join(name.split("_")[:2])]
    config.model.options = dict(dense=True, mix_token=True)
    imagenet_224(config)
    config.task.options.label_smoothing = 0.1
    config.task.options.token_labels = 0.5
