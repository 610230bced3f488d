"""Fine-tunes a pretrained ViT on a folder of class folders.

    python train.py --config=configs/finetune_folder.py:flowers --workdir=runs/flowers \
        --config.model.init_from=runs/vit_s16

The argument is the folder: flowers/train/<class>/*.jpg and flowers/test/<class>/*.jpg, or flowers/<class>/*.jpg alone,
of which a fixed share is held out. Another number of classes starts a fresh classifier, and positions are resampled to
another image size.

Cost: ViT-S/16 has 22.1 M parameters and needs 4.6 G multiply-adds an image forward at 224 pixels.
Expected: depends on the folder.
"""

from configs import base


def get_config(folder="images"):
    """Returns the configuration for the images in `folder`."""
    config = base.get_config()
    config.model.name = "vit_s16"
    config.model.drop_path = 0.1
    config.data.name = f"folder:{folder}"
    config.data.image_size = 224
    config.data.batch_size = 64
    config.data.train_transforms = "random_resized_crop({size}, scale=(0.3, 1.0))|flip|color_jitter(0.2)|normalize"
    config.data.eval_transforms = "resize({size/0.875})|center_crop({size})|normalize"
    config.optim.learning_rate = 3e-4
    config.optim.layer_decay = 0.75
    config.optim.weight_decay = 0.05
    config.optim.warmup = "10%"
    config.optim.clip_norm = 1.0
    config.optim.ema = 0.999
    config.train.steps = "20 epochs"
    config.task.options.label_smoothing = 0.1
    config.checkpoint.every_steps = config.eval.every_steps = "1 epochs"
    config.log.every_steps = 20
    return config
