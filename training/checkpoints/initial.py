"""Weights that are evaluated, that a frozen partner has or that a run starts from (`training/checkpoints/starts.py`):
read from a workdir, a checkpoint or a file of official weights, and fitted to a model.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

import data
import models
import tasks
from configs import Config
from data import classes
from models.weights import files
from models.weights.files import Weights
from models.weights.load import classifier_classes, read
from models.weights.wrappings import EMA
from tasks.base import Task
from training.checkpoints import checkpoint
from training.checkpoints import checkpoint_layout as layout


def abstract_model(task: Task) -> tuple[nnx.Module, Any, Any, Any]:
    """The task's model without numbers, and its split: graph, parameters and other state as shapes."""
    model = nnx.eval_shape(lambda: task.build_model(nnx.Rngs(0)))
    return model, *models.split(model)


def weights(saved: Mapping[str, Any], use_ema: bool = True) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Parameters and model state of a checkpoint with unrolled names, averaged ones if there are any and `use_ema`."""
    chosen = saved["ema"] if use_ema and saved["ema"] else saved
    return chosen["params"], chosen["model_state"]


def saved_info(saved: Mapping[str, Any]) -> data.Info:
    """What the data source of a saved run said about itself.

    Checkpoints from before fields had shapes have their kinds alone, and the shape of the image beside them.
    """
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in saved["metadata"]["info"].items()
    }
    shape = values.pop("image_shape", None)
    fields = {
        name: data.FieldSpec(**spec) if isinstance(spec, Mapping) else data.FieldSpec(spec)
        for name, spec in values["fields"].items()
    }
    if shape and "image" in fields:
        fields["image"] = dataclasses.replace(fields["image"], shape=shape)
    return data.Info(**{**values, "fields": fields})


def fit(loaded: Mapping[str, np.ndarray], template: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Brings arrays with unrolled names into the layout of `template`, which may be scanned.

    They are NumPy arrays where those of the template are, and JAX arrays otherwise.

    Raises:
      ValueError: names, shapes or types differ; one line with the first few.
    """
    found = {name: layout.ArrayInfo(array.shape, array.dtype.name) for name, array in loaded.items()}
    if different := layout.difference(found, layout.expected(template)):
        raise ValueError(f"{path}: the weights do not fit the model: {different}")
    return layout.fill(dict(template), loaded)


def find(path: str) -> None:
    """Refuses a place to start from that is not there.

    Raises:
      FileNotFoundError: neither a file of weights, nor a workdir or checkpoint.
    """
    if files.is_weight_file(path):
        files.check(path)
    else:
        checkpoint.find(path)


def read_official(
    path: str, config: Config, info: data.Info, which: str | None = None, *, average: bool = False
) -> dict[str, Any]:
    """A file of official weights for the model that a configuration describes, as if it were a checkpoint.

    What had to be adapted, such as positions for another image size, is said on stderr.

    Args:
      path: a file that `models.load_weights` reads.
      info: what the data says of itself: its classes are the model's, unless the file says others (`classes_of`).
      which: of several sets of weights in the file, `"raw"` or `"ema"`; None where there is one.
      average: take the moving average where there are several.

    Returns:
      What `training.checkpoints.checkpoint.restore_for_eval` returns, with step 0, averages that are the parameters
      where these are averages, and an empty configuration.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file cannot be read, holds several sets of weights, or does not fit the model.
    """

    def model_for(info: data.Info) -> nnx.Module:
        return abstract_model(tasks.create(config, info))[0]

    model = model_for(info)
    try:
        found = read(model, path, which, choice="--{}")
    except ValueError:
        if not average:
            raise
        found = read(model, path, EMA)
    theirs = classes_of(found, model, info)
    if theirs.num_classes != info.num_classes:
        model = model_for(theirs)
    info = theirs
    params, model_state, notes = models.convert_weights(model, found)
    say(path, notes)
    return {
        "params": params,
        "model_state": model_state,
        "ema": {"params": params, "model_state": model_state} if found.kind == EMA else None,
        "config": {},
        "step": 0,
        "metadata": {"info": dataclasses.asdict(info)},
        "path": path,
    }


def classes_of(found: Weights, model: nnx.Module, info: data.Info) -> data.Info:
    """`info` with the classes that a file of weights was trained on, as far as that is known.

    A file that `eval.py --export` wrote says them. One with a classifier for 1000 classes is ImageNet's where those of
    `info` are; others count as those of `info`.

    Args:
      model: one that the file is for, with any number of classes.
    """
    if found.class_names:
        return dataclasses.replace(info, num_classes=len(found.class_names), class_names=found.class_names)
    synsets = classes.imagenet()
    if classifier_classes(model, found) == len(synsets) and classes.imagenet_places(info.class_names):
        return dataclasses.replace(info, num_classes=len(synsets), class_names=synsets)
    return info


def say(what: str, notes: Iterable[str]) -> None:
    """Sentences about weights that were read, on stderr of the first process."""
    if jax.process_index() == 0:
        for note in notes:
            print(f"{what}: {note}", file=sys.stderr)
