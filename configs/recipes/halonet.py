"""Recipes for HaloNets: that of the paper (arXiv:2103.12731), and A1 of arXiv:2110.00476 for timm's hybrids."""

from ml_collections import ConfigDict

from configs.recipes.common import imagenet_224, known_model

# Side of the images, and the drop-path rate. The paper says of the latter that it grows to 0.2; the steps are ours.
HALONET_PAPER = {
    "halonet_h0": (256, 0.0),
    "halonet_h1": (256, 0.0),
    "halonet_h2": (256, 0.0),
    "halonet_h3": (320, 0.1),
    "halonet_h4": (384, 0.1),
    "halonet_h5": (448, 0.2),
    "halonet_h6": (512, 0.2),
    "halonet_h7": (600, 0.2),
}
HALONET_HYBRIDS = {
    "halonet26t": (256, 0.05),
    "sehalonet33ts": (256, 0.05),
    "halonet50ts": (256, 0.05),
    "eca_halonext26ts": (256, 0.05),
    "haloregnetz_b": (224, 0.05),
    "halo2botnet50ts": (256, 0.05),
}


def halonet(config: ConfigDict, name: str) -> ConfigDict:
    """ImageNet-1k from scratch for H0 to H7: 350 epochs of SGD with Nesterov momentum.

    There is no official code. The paper's dropout before the classifier and the strength of RandAugment, which grow
    with the model, are not known model by model: here there is no dropout, and magnitude 10. Its weight decay lies
    between 2e-5 and 8e-5.

    Raises:
      ValueError: `name` has no such recipe.
    """
    _start(config, name, HALONET_PAPER)
    config.data.train_transforms = "random_resized_crop({size})|flip|randaugment(2, 10)|normalize"
    config.data.batch_size = 4096
    config.optim.name = "sgd"
    config.optim.momentum = 0.9
    config.optim.nesterov = True
    config.optim.learning_rate = 0.1 * 4096 / 256
    config.optim.weight_decay = 4e-5
    config.optim.warmup = "10 epochs"
    config.optim.ema = 0.9999
    config.train.steps = "350 epochs"
    config.task.options.label_smoothing = 0.1
    return config


def halonet_hybrid(config: ConfigDict, name: str) -> ConfigDict:
    """ImageNet-1k from scratch for timm's hybrids: 600 epochs of LAMB with a sigmoid loss, A1 of arXiv:2110.00476.

    timm's own runs (`a1h` for halonet26t, halonet50ts and halo2botnet50ts) are like it with more drop path, dropout
    and RandAugment, in numbers that are not published; its others (`ra2`, `ra3`, `c1`) use RMSProp or SGD.

    Raises:
      ValueError: `name` has no such recipe.
    """
    _start(config, name, HALONET_HYBRIDS)
    augment = "randaugment(2, 7, std=0.5, probability=0.5, increasing=True)"
    config.data.train_transforms = f"random_resized_crop({{size}})|flip|{augment}|normalize"
    config.data.eval_transforms = "resize({size/0.95})|center_crop({size})|normalize"
    config.data.repeats = 3
    config.data.batch_size = 2048
    config.optim.name = "lamb"
    config.optim.learning_rate = 5e-3
    config.optim.weight_decay = 0.01
    config.optim.warmup = "5 epochs"
    config.train.steps = "600 epochs"
    config.task.options.loss = "sigmoid"
    config.task.options.label_smoothing = 0.1
    config.task.options.mixup = 0.2
    config.task.options.cutmix = 1.0
    return config


def _start(config: ConfigDict, name: str, known: dict[str, tuple[int, float]]) -> None:
    known_model(name, known)
    imagenet_224(config)
    config.model.name = name
    config.data.image_size, config.model.drop_path = known[name]
