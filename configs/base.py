"""The complete configuration: every key that exists, its default, its meaning and what it allows.

An experiment file starts from `get_config()` and changes values; it cannot add keys:

    from configs import base

    def get_config(arg=""):
        config = base.get_config()
        config.model.name = "vit_s16"
        return config

`python train.py --config=configs/quickstart.py --print_config` prints the result with this documentation.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from configs.duration import Duration
from configs.group import Group
from configs.schema import Field
from configs.size import Size
from configs.starts import WEIGHTS, Starts

_d = Duration.parse

FIELDS: dict[str, Any] = {
    "seed": Field(0, "Seed of initialization, data order, augmentation and dropout.", low=0, high=2**31 - 1),
    "model": {
        "name": Field("vit_ti16", "Model and variant; `models.names()` lists them."),
        "init_from": Field(
            "",
            "Workdir, checkpoint or file of official weights (docs/weights.md) whose parameters start the run; another "
            "number of classes or image size is adapted. A list starts parts of the model (docs/checkpoints.md).",
            kind=Starts,
        ),
        "init_weights": Field(
            "auto",
            "Which weights of init_from: the raw ones or their moving average (ema); auto takes the average of a run "
            "that has one, and of a file the only ones.",
            choices=WEIGHTS,
        ),
        "attention": Field("", "Attention module that replaces the model's own; empty keeps it."),
        "drop_path": Field(0.0, "Drop-path rate of the last block; rises linearly from 0.", low=0, high=0.999),
        "dropout": Field(0.0, "Dropout rate of tokens, projections and MLPs.", low=0, high=0.999),
        "scan": Field(True, "Scan over equal blocks: compile time does not grow with depth.", identity=False),
        "remat": Field(
            "auto", "What the backward pass recomputes: a policy of `models/core/remat.py`.", identity=False
        ),
        "options": Field({}, "Further keyword arguments of `models.create`, such as pool='avg'."),
    },
    "task": {
        "name": Field("classification", "What is learned; `tasks.names()` lists them."),
        "options": Field({}, "Options of that task (docs/tasks.md), such as label_smoothing=0.1."),
    },
    "data": {
        "name": Field(
            "digits",
            "digits | folder:PATH | hf:PATH | parquet:PATH | tar:PATH | a set that TFDS prepared | "
            "synthetic:classes=10,examples=1000,size=32; `python -m data` lists them.",
        ),
        "directory": Field("", "Where TFDS sets are prepared; empty for TFDS's own default.", identity=False),
        "train_split": Field("train", "Split to train on; slices such as 'train[:90%]' are allowed."),
        "eval_split": Field("test", "Split to evaluate on."),
        "batch_size": Field(128, "Examples per step over all processes.", low=1),
        "image_size": Field(224, "Side of model inputs in pixels, or height and width as in 160x224.", kind=Size),
        "train_transforms": Field(
            "random_resized_crop({size})|flip|normalize",
            "Training transforms, left to right (docs/data.md); {size} is data.image_size, {size/0.875} a quotient "
            "of it, {size//0.875} one rounded down.",
        ),
        "eval_transforms": Field("resize({size/0.875})|center_crop({size})|normalize", "Evaluation transforms."),
        "mean": Field((0.485, 0.456, 0.406), "Mean per channel that `normalize` subtracts, on a 0 to 1 scale."),
        "std": Field((0.229, 0.224, 0.225), "Standard deviation per channel that `normalize` divides by."),
        "pixel_range": Field(
            (),
            "Values of black and white in images of more than 8 bits, such as 0,4095; empty takes those that are in no "
            "doubt (docs/data.md).",
        ),
        "alpha": Field(
            "drop",
            "Transparent images: keep the stored colours, put them on a ground, or refuse them.",
            choices=("drop", "black", "white", "refuse"),
        ),
        "exif_rotation": Field(False, "Turn images as the camera noted in their EXIF block."),
        "repeats": Field(
            1,
            "Repeated augmentation: each example comes this many times, augmented anew; an epoch has as many "
            "examples as before.",
            low=1,
        ),
        "workers": Field(
            0, "Worker processes per host; 0 reads in threads of the main process.", low=0, identity=False
        ),
        "threads": Field(4, "Reading threads per process.", low=1, identity=False),
        "prefetch": Field(4, "Batches read ahead.", low=1, identity=False),
        "cache": Field(
            "auto",
            "Keep decoded examples in memory: auto does so for small sets.",
            choices=("auto", "memory", "none"),
            identity=False,
        ),
        "on_error": Field(
            "raise",
            "A record that cannot be read stops the run, or is replaced deterministically and counted.",
            choices=("raise", "replace"),
        ),
    },
    "optim": {
        "name": Field(
            "adamw",
            "Optimizer, one of ours or optax:NAME.",
            choices=("adamw", "lamb", "lion", "sgd", "muon"),
            prefix="optax:",
        ),
        "learning_rate": Field(1e-3, "Peak learning rate.", low=0),
        "schedule": Field("cosine", "Shape after warm-up.", choices=("cosine", "linear", "rsqrt", "constant")),
        "warmup": Field(_d("5%"), "Linear warm-up from 0."),
        "cooldown": Field(_d(0), "Linear cool-down to the final rate at the end of an rsqrt or constant schedule."),
        "final_fraction": Field(0.0, "Learning rate at the end over its peak.", low=0, high=1),
        "weight_decay": Field(0.05, "Decoupled weight decay, multiplied by the learning rate.", low=0),
        "weight_decay_on": Field(
            "matrices", "Parameters that decay; see docs/optim.md.", choices=("kernels", "matrices", "all")
        ),
        "b1": Field(
            None,
            "Decay of the first moment; none takes the optimizer's usual value (docs/optim.md).",
            low=0,
            high=1,
            kind=float,
        ),
        "b2": Field(None, "Decay of the second moment; none takes the usual value.", low=0, high=1, kind=float),
        "eps": Field(None, "Added to the root of the second moment; none takes the usual value.", low=0, kind=float),
        "momentum": Field(None, "Momentum of SGD and Muon; none takes the usual value.", low=0, high=1, kind=float),
        "nesterov": Field(None, "Nesterov momentum for SGD and Muon; none takes the usual choice.", kind=bool),
        "mu_dtype": Field("float32", "Storage of the first moment.", choices=("float32", "bfloat16")),
        "layer_decay": Field(1.0, "Learning-rate factor per layer below the head; 1 is off.", low=0, high=1),
        "freeze": Field(
            (), "Regular expressions of parameters or modules that stay as they are, such as 'blocks.[0-5]'."
        ),
        "clip_norm": Field(0.0, "Global gradient norm above which gradients are scaled down; 0 is off.", low=0),
        "options": Field({}, "Keyword arguments of optax:NAME, such as eps=1e-7 (docs/optim.md)."),
        "accumulate": Field(1, "Parts that a batch is split into, one after another, to save memory.", low=1),
        "ema": Field(
            0.0,
            "Decay per step of the moving average of parameters and float model state; 0 keeps none.",
            low=0,
            high=1,
        ),
    },
    "train": {
        "steps": Field(_d("10 epochs"), "Length of training."),
        "precision": Field(
            "float32", "Type of the computation; parameters are float32.", choices=("float32", "bfloat16")
        ),
        "nonfinite": Field(
            "stop",
            "A step whose loss, gradient or update is not finite stops the run, or is left out and counted.",
            choices=("stop", "skip"),
        ),
        "most_skipped": Field(
            100, "Steps in a row that nonfinite=skip leaves out; then the run stops.", low=1, identity=False
        ),
    },
    "mesh": {
        "data": Field(
            -1, "Devices over which batches are split; -1 takes what the others leave.", low=-1, identity=False
        ),
        "fsdp": Field(1, "Devices over which batches, parameters and optimizer are split.", low=1, identity=False),
        "tensor": Field(1, "Devices over which matrices are split.", low=1, identity=False),
    },
    "checkpoint": {
        "every_steps": Field(_d("10%"), "Time between checkpoints; 0 saves at the end only.", identity=False),
        "keep_last": Field(2, "Newest checkpoints that are kept.", low=1, identity=False),
        "keep_best": Field(1, "Best checkpoints that are kept besides, by the task's metric.", low=0, identity=False),
    },
    "eval": {
        "every_steps": Field(_d("10%"), "Time between evaluations; 0 evaluates at the end only.", identity=False),
        "batch_size": Field(0, "Examples per evaluation step; 0 takes data.batch_size.", low=0, identity=False),
        "sets": Field(
            (),
            "Further sets: 'label=source@split', such as 'train=digits@train[:500]', or mappings with transforms, "
            "options and more (docs/evaluation.md).",
            identity=False,
        ),
        "fit": Field(
            "",
            "Set that is seen before data.eval_split is measured, 'source@split', for tasks that need one "
            "(docs/evaluation.md); an empty source is data.name.",
            identity=False,
        ),
        "on_error": Field(
            "stop",
            "When a set cannot be evaluated: stop the run with its state saved, or say so and continue. Several "
            "processes stop.",
            choices=("stop", "continue"),
            identity=False,
        ),
        "preprocessing": Field(
            "auto",
            "What images go through where eval.py evaluates a file of weights: what the file or its model says (auto), "
            "or data.eval_transforms (config); docs/preprocessing.md.",
            choices=("auto", "config"),
            identity=False,
        ),
        "use_ema": Field(True, "Evaluate the moving average where there is one.", identity=False),
        "worst": Field(24, "Worst mistakes that are kept for the report.", low=0, identity=False),
    },
    "log": {
        "every_steps": Field(
            _d(50), "Time between log lines; the only steps whose results the host reads.", identity=False
        ),
        "tensorboard": Field(True, "Write TensorBoard event files.", identity=False),
        "wandb": Field("", "Weights & Biases project; empty is off.", identity=False),
        "example_ids": Field(False, "Write the ids of each step's examples to examples.jsonl.", identity=False),
        "cache_directory": Field("~/.cache/fovea/xla", "Persistent compilation cache; empty is off.", identity=False),
    },
}

MOVED = {
    "train.task": "task.name",
    "train.options": "task.options",
    **{
        f"train.{name}": f"task.options.{name}"
        for name in (
            "loss",
            "label_smoothing",
            "mixup",
            "cutmix",
            "mixup_probability",
            "mixup_switch_probability",
            "teacher",
            "distill",
            "distill_weight",
            "distill_temperature",
            "token_labels",
        )
    },
}
"""Keys by the name that they had when tasks had no options of their own: older workdirs and command lines have them."""


def get_config() -> Group:
    """Returns the defaults as a dictionary that experiment files change; unknown keys raise."""
    places: dict[str, str] = {}

    def group(fields: dict[str, Any], prefix: str) -> Group:
        values = {
            k: ConfigDict({}, type_safe=False)
            if isinstance(f, Field) and isinstance(f.default, dict)
            else f.default
            if isinstance(f, Field)
            else group(f, f"{prefix}{k}.")
            for k, f in fields.items()
        }
        return Group(values, prefix, places)

    config = group(FIELDS, "")
    config.lock()
    for name in ("model", "optim", "task"):
        config[name].options.unlock()
    return config
