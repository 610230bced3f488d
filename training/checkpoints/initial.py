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
from models.weights import files
from models.weights.load import read
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
    """What the data source of a saved run said about itself."""
    return data.Info.of_json(saved["metadata"]["info"])


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

    What had to be adapted, such as learned positions, is said on stderr.

    Args:
      path: a file that `models.load_weights` reads.
      info: what the data says of itself: the file is for such data, unless it says otherwise (`Task.info_of_file`).
      which: of several sets of weights in the file, `"raw"` or `"ema"`; None where there is one.
      average: take the moving average where there are several.

    Returns:
      What `training.checkpoints.checkpoint.restore_for_eval` returns, with step 0, averages that are the parameters
      where these are averages, and an empty configuration.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file cannot be read, holds several sets of weights, or does not fit the model.
    """

    task = tasks.create(config, info)
    model = abstract_model(task)[0]
    try:
        found = read(model, path, which, choice="--{}")
    except ValueError:
        if not average:
            raise
        found = read(model, path, EMA)
    if (theirs := task.info_of_file(found, model)) != info:
        info, model = theirs, abstract_model(tasks.create(config, theirs))[0]
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


def say(what: str, notes: Iterable[str]) -> None:
    """Sentences about weights that were read, on stderr of the first process."""
    if jax.process_index() == 0:
        for note in notes:
            print(f"{what}: {note}", file=sys.stderr)
