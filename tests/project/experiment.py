"""One experiment for each of the tasks of this folder: `--config=experiment.py:pairs`."""

from configs import base

TRAINED = {
    # name: (data, model, task, image_size, steps, learning rate)
    "pairs": ("pairs:open_pairs", "pairs:Smooth", "pairs:Denoising", "12x16", 80, 0.05),
    "towers": ("towers:open_captions", "towers:Towers", "towers:Contrastive", 8, 150, 0.01),
    "diffusion": ("diffusion:open_patterns", "diffusion:Clean", "diffusion:Diffusion", 4, 300, 0.005),
    "words": ("words:open_rows", "words:Causal", "words:NextToken", 224, 300, 0.01),
    "scanpaths": ("scanpaths:open_fixations", "scanpaths:Gaze", "scanpaths:Scanpath", 8, 200, 0.01),
    "voxels": ("voxels:open_voxels", "voxels:Readout", "voxels:Encoding", 4, 200, 0.1),
}


def get_config(name):
    """The experiment of that name."""
    config = base.get_config()
    config.data.batch_size = 16
    config.eval.batch_size = 6  # divides no set
    config.log.every_steps, config.eval.every_steps, config.checkpoint.every_steps = 20, "50%", "50%"
    config.log.tensorboard = False
    if name == "neighbours":
        config.task.name = "neighbours:Neighbours"
        config.data.name, config.data.image_size = "digits", 8
        config.data.eval_split, config.eval.fit = "test[:50]", "@train[:300]"
        config.eval.sets = ({"label": "one", "split": "test[:50]", "fit": "@train[:100]", "options": {"k": 1}},)
        config.data.eval_transforms = "to_rgb|value_range(0, 1)"
        return config
    source, model, task, size, steps, rate = TRAINED[name]
    config.data.name, config.model.name, config.task.name = source, model, task
    config.data.image_size = size
    config.train.steps, config.optim.learning_rate, config.optim.warmup = steps, rate, "0"
    config.optim.ema, config.optim.accumulate = 0.9, 1 if name == "towers" else 2
    scale = "value_range(0, 1)"
    if name == "diffusion":
        scale = "value_range(-1, 1)"
    if name == "scanpaths":
        scale += "|pad_rows(4)"
    config.data.train_transforms = config.data.eval_transforms = scale
    if name == "words":
        config.data.train_transforms = config.data.eval_transforms = ""
    if name == "pairs":
        config.data.train_transforms = f"random_crop({{size}})|flip|{scale}"
        config.eval.sets = ({"label": "tiled", "split": "test", "options": {"tile": 8}, "every_steps": "100%"},)
    return config
