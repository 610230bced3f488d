"""A model that is ready to be evaluated: that of a checkpoint, or the one that a task without training builds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

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
from training.checkpoints import initial, partners
from training.distributed import mesh, processes
from training.run.evaluate import Evaluator, Results
from training.run.evaluations import Evaluations
from training.run.state import Flat
from training.run.terminal import Terminal


@dataclasses.dataclass(frozen=True)
class Trained:
    """Weights on the devices and the compiled step that evaluates them.

    Attributes:
      weights: `"ema"` for the moving average, `"raw"` for the parameters themselves.
      step: the training step of the checkpoint; 0 without one.
      origin: the checkpoint or the file that the weights were read from; empty where the task built them.
    """

    config: Config
    task: Task
    evaluator: Evaluator
    params: Flat
    model_state: Flat
    weights: str
    step: int
    origin: str = ""

    @property
    def model(self) -> nnx.Module:
        """The model with its weights, to call and to look into."""
        return models.merge(self.evaluator.graph, self.params, self.model_state)

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
    if saved["config"]:
        loaded = _for_inputs(task, abstract, loaded, templates[0], configs.from_dict(saved["config"]))
    parts = zip((loaded, *state), templates, strict=True)
    model = models.merge(graph, *(initial.fit(part, template, str(saved["path"])) for part, template in parts))
    return _place(task, config, model, "ema" if averaged else "raw", saved["step"], str(saved["path"]))


def _for_inputs(
    task: Task,
    model: nnx.Module,
    params: Mapping[str, np.ndarray],
    template: Mapping[str, Any],
    before: Config,
) -> dict[str, np.ndarray]:
    """The parameters for inputs of other shapes than they were trained on; what changes is said on stderr."""
    trained_on = task.changed(before).example_inputs(1)
    different = [name for name, spec in task.example_inputs(1).items() if spec != trained_on.get(name)]
    if not different:
        return dict(params)
    where = f"for another {different[0]} than it was trained on"
    try:
        adapted, notes = task.adapted(model, params, unrolled(template), before)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    initial.say(where, notes)
    return adapted


def _place(task: Task, config: Config, model: nnx.Module, weights: str, step: int, origin: str = "") -> Trained:
    device_mesh = mesh.create(config.mesh)
    graph, *leaves = models.split(model)
    shardings = mesh.tree_shardings(leaves, sharding.rules(model), device_mesh)
    params, model_state = mesh.place(leaves, shardings)
    helpers = task.partners(partners.loader(task), train=False)
    partner_graphs, arrays, _ = partners.spread(helpers, device_mesh)
    terminal = Terminal(quiet=not processes.is_first())
    evaluator = Evaluator(task, graph, config, device_mesh, partner_graphs, arrays, terminal)
    return Trained(config, task, evaluator, params, model_state, weights, step, origin)
