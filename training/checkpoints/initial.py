"""Weights that a run starts from, that are evaluated or that a frozen partner has: read from a workdir, a checkpoint or
a file of official weights, and fitted to a model.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

import configs
import data
import models
import tasks
from configs import Config
from models.weights import files
from models.weights.load import read
from models.weights.wrappings import EMA, RAW
from tasks.base import Task
from training.checkpoints import checkpoint
from training.checkpoints import checkpoint_layout as layout
from training.distributed import mesh

AUTO = "auto"
"""Value of `config.model.init_weights` that takes the averaged weights of a run where it has some, and the only ones of
a file."""


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
    values: dict[str, Any] = saved["metadata"]["info"]
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return data.Info(**fields)


def load_model(path: str, use_ema: bool = True) -> nnx.Module:
    """Rebuilds the trained model of a workdir or checkpoint, to be evaluated or to teach.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: the weights are those of another model.
    """
    saved = checkpoint.restore_for_eval(path)
    config = configs.from_dict(saved["config"])
    _, graph, params, state = abstract_model(tasks.create(config, saved_info(saved)))
    new_params, new_state = weights(saved, use_ema)
    return models.merge(graph, fit(new_params, params, path), fit(new_state, state, path))


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


def read_official(path: str, config: Config, info: data.Info, which: str | None = None) -> dict[str, Any]:
    """A file of official weights for the model that a configuration describes, as if it were a checkpoint.

    What had to be adapted, such as positions for another image size, is said on stderr.

    Args:
      path: a file that `models.load_weights` reads.
      info: what the data says of itself; the classifier has to have as many classes.
      which: of several sets of weights in the file, `"raw"` or `"ema"`; None where there is one.

    Returns:
      What `training.checkpoints.checkpoint.restore_for_eval` returns, with step 0, averages that are the parameters
      where these are averages, and an empty configuration.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file cannot be read, holds several sets of weights, or does not fit the model.
    """
    model = abstract_model(tasks.create(config, info))[0]
    found = read(model, path, which, choice="--{}")
    params, model_state, notes = models.convert_weights(model, found)
    _say(path, notes)
    return {
        "params": params,
        "model_state": model_state,
        "ema": {"params": params, "model_state": model_state} if found.kind == EMA else None,
        "config": {},
        "step": 0,
        "metadata": {"info": dataclasses.asdict(info)},
        "path": path,
    }


def start_from(
    config: Config, params: Mapping[str, jax.Array], model_state: Mapping[str, jax.Array], model: nnx.Module
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Starts a fresh model from saved weights or from a file of official ones.

    What the model can adapt (a classifier for another number of classes, positions of another image size) is adapted
    and said on stderr, as is which of several weights are taken; everything else has to fit.

    Args:
      config: its `model.init_from` is a workdir, checkpoint or file of weights, of which `model.init_weights` are
        taken.
      params, model_state: the fresh ones.
      model: knows what may be adapted.

    Returns:
      Parameters and model state in the layout of the fresh ones, whole and on the host in every process.
    """
    path, which = config.model.init_from, config.model.init_weights
    fresh, fresh_state = mesh.gather((dict(params), dict(model_state)))
    where = f"config.model.init_from={path}"
    try:
        if files.is_weight_file(path):
            own = models.merge(models.split(model)[0], fresh, fresh_state)
            found = read(own, path, None if which == AUTO else which, choice="config.model.init_weights={}")
            loaded, loaded_state, notes = models.convert_weights(own, found)
        else:
            saved = checkpoint.restore_for_eval(path)
            if which == EMA and not saved["ema"]:
                raise ValueError("config.model.init_weights=ema: it has no moving average (the run had optim.ema=0)")
            loaded, loaded_state = weights(saved, which != RAW)
            loaded, notes = models.adapt(model, loaded, models.unstack(fresh))
            if saved["ema"]:
                taken, other = ("raw", "averaged") if which == RAW else ("averaged", "raw")
                notes = [f"the {taken} weights are taken, not the {other} ones", *notes]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    fitted = fit(loaded, fresh, where), fit(loaded_state, fresh_state, where)
    _say(f"init_from {path}", notes)
    return fitted


def _say(what: str, notes: Iterable[str]) -> None:
    if jax.process_index() == 0:
        for note in notes:
            print(f"{what}: {note}", file=sys.stderr)
