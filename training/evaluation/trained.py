"""A model that is ready to be evaluated: that of a checkpoint, or the one that a task without training builds."""

from __future__ import annotations

import dataclasses
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
from configs import Config
from models.core import sharding
from models.core.state import unrolled
from tasks.base import Task
from training.checkpoints import initial, inputs, partners
from training.distributed import mesh, processes
from training.run.evaluate import Evaluator, Results
from training.run.evaluations import Evaluations
from training.run.log import Terminal
from training.run.state import Flat


@dataclasses.dataclass(frozen=True)
class Trained:
    """Weights on the devices and the compiled step that evaluates them.

    Attributes:
      weights: `"ema"` for the moving average, `"raw"` for the parameters themselves.
      step: the training step of the checkpoint; 0 without one.
    """

    config: Config
    task: Task
    evaluator: Evaluator
    params: Flat
    model_state: Flat
    weights: str
    step: int

    def evaluate(self, source: data.Source) -> Results:
        """The task's results on one set."""
        return self.evaluator(self.params, self.model_state, source)

    def evaluations(self) -> Evaluations:
        """The sets of the configuration; all of them are checked before the first one is evaluated."""
        return Evaluations(self.config, self.evaluator)


def load(
    saved: Mapping[str, Any] | None,
    config: Config,
    *,
    use_ema: bool | None = None,
    info: data.Info | None = None,
    task: Task | None = None,
) -> Trained:
    """Puts the model of a checkpoint on the devices.

    Args:
      saved: what `training.checkpoints.checkpoint.restore_for_eval` returned; None for a task that never trains, which
        builds its model itself.
      config: the configuration to evaluate with; it has to describe the model of the checkpoint.
      use_ema: whether to take the moving average; None takes it if `config.eval.use_ema` and the checkpoint has one.
      info: what the data says of itself, where no checkpoint does.
      task: in place of the one that `config.task.name` names.

    Raises:
      ValueError: the weights do not fit the model, there is no moving average, or nothing to load for a task that
        trains.
    """
    task = task or tasks.create(config, initial.saved_info(saved) if saved else info)
    if saved is None:
        if task.trains:
            raise ValueError(f"task {config.task.name} has to be trained first: give --workdir or --checkpoint")
        return _place(task, config, task.build_model(nnx.Rngs(config.seed)), "raw", 0)
    if use_ema and not saved["ema"]:
        raise ValueError(f"--ema: {saved['path']} has no moving average (the run had optim.ema=0)")
    averaged = bool(saved["ema"]) and (config.eval.use_ema if use_ema is None else use_ema)
    abstract, graph, *templates = initial.abstract_model(task)
    loaded, *state = initial.weights(saved, averaged)
    trained_on = inputs.sides(configs.from_dict(saved["config"])) if saved["config"] else inputs.sides(config)
    if trained_on != inputs.sides(config):
        loaded = _for_size(abstract, loaded, templates[0], config, trained_on)
    parts = zip((loaded, *state), templates, strict=True)
    model = models.merge(graph, *(initial.fit(part, template, str(saved["path"])) for part, template in parts))
    return _place(task, config, model, "ema" if averaged else "raw", saved["step"])


def _for_size(
    model: nnx.Module,
    params: Mapping[str, np.ndarray],
    template: Mapping[str, Any],
    config: Config,
    trained_on: tuple[int, int],
) -> dict[str, np.ndarray]:
    """The parameters for images of another size than `trained_on`, (height, width); what changes is said on stderr."""
    where = f"config.data.image_size={config.data.image_size}"
    try:
        adapted, notes = models.adapt(model, params, unrolled(template), image_size=trained_on)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if jax.process_index() == 0:
        for note in notes:
            print(f"{where}: {note}", file=sys.stderr)
    return adapted


def _place(task: Task, config: Config, model: nnx.Module, weights: str, step: int) -> Trained:
    device_mesh = mesh.create(config.mesh)
    graph, *leaves = models.split(model)
    shardings = mesh.tree_shardings(leaves, sharding.rules(model), device_mesh)
    params, model_state = mesh.place(leaves, shardings)
    helpers = task.partners(partners.loader(config, task.info), train=False)
    partner_graphs, arrays, _ = partners.spread(helpers, device_mesh)
    terminal = Terminal(quiet=not processes.is_first())
    evaluator = Evaluator(task, graph, config, device_mesh, partner_graphs, arrays, terminal)
    return Trained(config, task, evaluator, params, model_state, weights, step)
