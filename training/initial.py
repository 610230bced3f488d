"""Weights that a run starts from or that a frozen partner has: read from a workdir or a checkpoint and fitted to a
model.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

import configs
import data
import models
import tasks
from tasks.base import Task
from training import checkpoint
from training import checkpoint_layout as layout


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
    _, graph, params, state = abstract_model(tasks.create(config.train.task, config, saved_info(saved)))
    new_params, new_state = weights(saved, use_ema)
    return models.merge(graph, fit(new_params, params, path), fit(new_state, state, path))


def fit(loaded: Mapping[str, np.ndarray], template: Mapping[str, Any], path: str) -> dict[str, jax.Array]:
    """Brings arrays with unrolled names into the layout of `template`, which may be scanned.

    Raises:
      ValueError: names, shapes or types differ; one line with the first few.
    """
    found = {name: layout.ArrayInfo(array.shape, array.dtype.name) for name, array in loaded.items()}
    if different := layout.difference(found, layout.expected(template)):
        raise ValueError(f"{path}: the weights do not fit the model: {different}")
    return layout.fill(dict(template), loaded)


def start_from(
    path: str, params: Mapping[str, jax.Array], model_state: Mapping[str, jax.Array], model: nnx.Module
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Starts a fresh model from saved weights (averaged ones where there are any).

    What the model can adapt (a classifier for another number of classes, positions of another image size) is adapted
    and said on stderr; everything else has to fit.

    Args:
      path: workdir or checkpoint.
      params, model_state: the fresh ones.
      model: knows what may be adapted.

    Returns:
      Parameters and model state in the layout of the fresh ones.
    """
    loaded, loaded_state = weights(checkpoint.restore_for_eval(path))
    fresh = models.unstack({name: np.asarray(value) for name, value in params.items()})
    try:
        loaded, notes = models.adapt(model, loaded, fresh)
    except ValueError as error:
        raise ValueError(f"config.model.init_from={path}: {error}") from error
    fitted = (
        fit(loaded, params, f"config.model.init_from={path}"),
        fit(loaded_state, model_state, f"config.model.init_from={path}"),
    )
    for note in notes:
        print(f"init_from {path}: {note}", file=sys.stderr)
    return fitted
