"""Frozen partners of a run, such as a teacher: trained models in its terms (`tasks/terms.py`).

A partner is a workdir, a checkpoint, or a file of official weights behind the configuration that describes its model,
`configs/vit_s16_imagenet.py:vit_s16.safetensors`, as `eval.py` takes them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

import configs
import data
import models
import tasks
from configs import Config
from models.core import sharding
from models.weights import files
from tasks.base import Task
from training.checkpoints import checkpoint, initial
from training.distributed import mesh

Arrays = dict[str, tuple[dict[str, Any], dict[str, Any]]]


def spread(
    helpers: Mapping[str, nnx.Module], device_mesh: Mesh, *, shapes_only: bool = False
) -> tuple[dict[str, models.Graph], Arrays, Any]:
    """What a compiled step takes of partners, spread over the mesh by the rules of their models.

    Args:
      helpers: by name, with their numbers.
      shapes_only: nothing is put on the devices, which may be described ones.

    Returns:
      Their static parts, `{name: (parameters, state)}`, and where these lie.

    Raises:
      ValueError: the devices do not divide what a partner consists of; names it.
    """
    graphs, arrays, shardings = dict[str, models.Graph](), Arrays(), dict[str, Any]()
    for name, helper in helpers.items():
        graphs[name], *leaves = models.split(helper)
        arrays[name] = (leaves[0], leaves[1])
        try:
            shardings[name] = mesh.tree_shardings(arrays[name], sharding.rules(helper), device_mesh)
        except ValueError as error:
            raise ValueError(f"partner {name!r}: {error}") from error
    placed = jax.eval_shape(lambda: arrays) if shapes_only else mesh.place(arrays, shardings)
    return graphs, placed, shardings


def loader(task: Task) -> Callable[..., nnx.Module]:
    """`load(path)` for `Task.partners`."""
    return functools.partial(load, task)


def load(task: Task, path: str, **how: Any) -> nnx.Module:
    """The trained model of a partner, in the terms of a task's run. What had to be changed is said on stderr.

    Args:
      path: workdir, checkpoint, or `CONFIG.py:FILE` for a file of official weights.
      how: further arguments of `Task.partner`.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: it is another model than its configuration says, or cannot be brought to the terms of the run.
    """
    model, theirs, their_info = _trained(path, task.info)
    try:
        model, notes = task.partner(model, theirs, their_info, **how)
    except ValueError as error:
        raise ValueError(f"partner {path}: {error}") from error
    initial.say(f"partner {path}", notes)
    return model


def _trained(path: str, info: data.Info) -> tuple[nnx.Module, Config, data.Info]:
    described, _, file = path.rpartition(":")
    if not described and files.is_weight_file(path):
        raise ValueError(f"{path}: a file of weights does not say its model; write configs/FILE.py:{path}")
    if described and files.is_weight_file(file):
        config = configs.load(described)
        saved = initial.read_official(file, config, info, average=True)
    else:
        saved = checkpoint.restore_for_eval(path)
        config = configs.from_dict(saved["config"])
    their_info = initial.saved_info(saved)
    _, graph, *templates = initial.abstract_model(tasks.create(config, their_info))
    parts = zip(initial.weights(saved), templates, strict=True)
    return models.merge(graph, *(initial.fit(loaded, like, path) for loaded, like in parts)), config, their_info
