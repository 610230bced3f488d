"""Configurations small enough that a whole run takes seconds."""

import json
import tempfile
from pathlib import Path

import configs
from configs import base
from training.run.terminal import Terminal

# Shared by all tests and their child processes: the same small programs are compiled once.
CACHE = Path(tempfile.gettempdir()) / "fovea-test-cache"

TINY = {
    "model.name": "vit_mu16",
    "model.options": dict(patch_size=8, depth=2, width=16, heads=2, mlp_width=32),
    "data.name": "synthetic:classes=4,examples=64,size=16",
    "data.batch_size": 16,
    "data.image_size": 16,
    "data.train_transforms": "flip|normalize",
    "data.eval_transforms": "normalize",
    "optim.warmup": "0",
    "train.steps": 4,
    "checkpoint.every_steps": "0",
    "eval.every_steps": "0",
    "log.every_steps": 1,
    "log.tensorboard": False,
    "log.cache_directory": str(CACHE),
}


OWN_MODEL = {"model__name": base.FIELDS["model"]["name"].default, "model__options": {}}
"""Overrides for a task that builds a model of its own: a key that it does not read may not be set."""


LINEAR = {"model__name": "tiny_linear:Linear", "model__options": {}}
"""Overrides for a model that is traced and compiled in no time."""


def config(**overrides):
    """A tiny classification run; `optim__ema=0.9` sets optim.ema."""
    return configs.from_dict({}, {**TINY, **{key.replace("__", "."): value for key, value in overrides.items()}})


def flags(**overrides):
    """The same as words of a command line, after `--config=tests/defaults.py`."""
    values = {**TINY, **{key.replace("__", "."): value for key, value in overrides.items()}}
    options = values.pop("model.options")
    return [f"--config.{key}={value}" for key, value in values.items()] + [
        f"--config.model.options.{key}={value}" for key, value in options.items()
    ]


def quiet():
    """A terminal that says nothing."""
    return Terminal(quiet=True)


def rows(workdir, kind="train"):
    """Logged rows of one kind."""
    lines = (json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if row["kind"] == kind]
