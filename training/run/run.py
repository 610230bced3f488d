"""From a configuration to everything that a loop needs, with every check that needs no compilation.

Nothing here writes: what is wrong with a run is said before its workdir is touched.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

import configs
import data
import models
import tasks
from configs import Config
from models.core import sharding
from tasks.base import Task
from training.checkpoints import initial, partners, starts
from training.distributed import mesh
from training.optim import frozen, optim, schedules
from training.run import compiling, feeding, step
from training.run.health import healthy
from training.run.state import TrainState


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that has been checked and not yet started.

    Attributes:
      source: the examples to learn from; `examples` per epoch (repeats do not lengthen one).
      model: the model without numbers; `graph` is its static part.
      template: shapes and types of the state; `shardings` has the same structure.
      total_steps: length of the run.
      step: the compiled step `(state, batch, partners) -> (state, done)`; it donates the state.
      fresh_metrics: zeroed sums for the log.
      group_names: parameter groups in the order of `state.health["bad_groups"]`.
      partner_graphs, partner_arrays, partner_shardings: frozen partner models, and where their arrays lie.
    """

    config: Config
    task: Task
    source: data.Source
    mesh: jax.sharding.Mesh
    model: nnx.Module
    graph: Any
    template: TrainState
    shardings: TrainState
    total_steps: int
    examples: int
    learning_rate: Callable[[Any], Any]
    step: Callable[..., tuple[TrainState, jax.Array]]
    initial_state: Callable[[], TrainState]
    fresh_metrics: Callable[[], Any]
    group_names: tuple[str, ...]
    partner_graphs: Mapping[str, Any]
    partner_arrays: Mapping[str, Any]
    partner_shardings: Mapping[str, Any]

    def steps(self, duration: Any) -> int:
        """A duration of this run in steps."""
        return duration.steps(batch_size=self.config.data.batch_size, examples=self.examples, total=self.total_steps)


def _total_steps(config: Config, examples: int) -> int:
    total = config.train.steps.steps(batch_size=config.data.batch_size, examples=examples)
    if total < 1:
        raise ValueError(f"config.train.steps={config.train.steps}: a run takes at least one step")
    return total


def prepare(
    config: Config,
    *,
    task: Task | None = None,
    source: data.Source | None = None,
    devices: Sequence[jax.Device] | None = None,
    examples: int | None = None,
    begins: bool = True,
) -> Run:
    """Builds task, model shapes, optimizer, mesh and the jitted step.

    Args:
      task: in place of the one that `config.task.name` names.
      source: in place of the one that `config.data` names.
      devices: in place of those of this process. Where they are those of a described topology, which can be compiled
        for and not run on, `partner_arrays` are shapes.
      examples: in an epoch, by which lengths of this run are counted; None for those of the source.
      begins: whether the run begins here. One that goes on from a state of its own needs nothing of
        `config.model.init_from`, which may be gone.

    Raises:
      ValueError, FileNotFoundError: something in the configuration cannot work; the message says which key.
    """
    device_mesh = mesh.create(config.mesh, devices)
    mesh.check_batch("config.data.batch_size", config.data.batch_size, device_mesh, config.optim.accumulate)
    source = feeding.open_source(config, config.data.name, config.data.train_split) if source is None else source
    task = tasks.create(config, source.info) if task is None else task
    if not task.trains:
        raise ValueError(f"config.task.name={config.task.name}: this task has nothing to train; run eval.py")
    if task.couples_batch and config.optim.accumulate > 1:
        raise ValueError(
            f"config.optim.accumulate={config.optim.accumulate}: the loss of task {config.task.name!r} compares the "
            "examples of a batch with each other, so that the loss of parts is another one; it takes accumulate=1 "
            "(less memory: model.remat, more devices, or a smaller data.batch_size)"
        )
    examples = examples or len(source)
    total = _total_steps(config, examples)

    def steps(name: str) -> int:
        return getattr(config.optim, name).steps(batch_size=config.data.batch_size, examples=examples, total=total)

    warmup, cooldown = steps("warmup"), steps("cooldown")
    if warmup + cooldown > total:
        raise ValueError(
            f"config.optim.warmup={warmup} + cooldown={cooldown} steps are more than config.train.steps={total}"
        )
    learning_rate = schedules.learning_rate(config.optim, total, warmup, cooldown)

    model, graph, params, model_state = initial.abstract_model(task)
    optimizer = optim.build(
        config.optim,
        params,
        learning_rate,
        layer_of=getattr(model, "layer_id", None),
        num_layers=getattr(model, "num_layers", None),
        groups=task.optimizers(),
        losses=task.losses(),
    )
    helpers = task.partners(partners.loader(task))
    partner_graphs, partner_arrays, partner_shardings = partners.spread(helpers, device_mesh, shapes_only=bool(devices))
    batch_shapes = task.batch_spec(config.data.batch_size, train=True)
    feeding.check(config, source, batch_shapes, training=True)

    begin_with = starts.of_config(config)
    if begins:
        starts.check(begin_with, params)

    def arrays(seed: Any) -> tuple[Any, Any]:
        return models.split(task.build_model(nnx.Rngs(jax.random.key(seed))))[1:]

    parts = step.loss_parts(task, graph, params, model_state, batch_shapes, partner_graphs, partner_arrays)

    def build(params: Any, model_state: Any) -> TrainState:
        ema = {"params": params, "model_state": model_state} if config.optim.ema else {}
        # The moving average starts as a copy: a donated buffer may not appear twice.
        ema = jax.tree.map(lambda x: x.copy(), ema)
        return TrainState(
            step=jax.numpy.zeros((), jax.numpy.int32),
            params=params,
            model_state=model_state,
            opt_state=optimizer.init(params),
            ema=ema,
            key=jax.random.key(config.seed),
            health=healthy(len(optimizer.group_names)),
            metrics=step.fresh_metrics(task, parts),
        )

    template = jax.eval_shape(build, params, model_state)
    shardings = mesh.tree_shardings(template, sharding.rules(model), device_mesh)

    def initial_state() -> TrainState:
        # Random generators take long to optimize and run once: on a CPU 10 s of compilation become 2 s without.
        options = {"xla_backend_optimization_level": 0} if device_mesh.devices.flat[0].platform == "cpu" else None
        fresh = jax.jit(arrays, out_shardings=(shardings.params, shardings.model_state), compiler_options=options)
        compiling.ahead(fresh, config.seed, what="the initial parameters")
        params, model_state = fresh(config.seed)
        if begin_with:
            params, model_state = starts.start_from(begin_with, task, params, model_state, model)
            params, model_state = mesh.place((params, model_state), (shardings.params, shardings.model_state))
        return jax.jit(build, out_shardings=shardings)(params, model_state)

    training_graph, constants = frozen.training_graph(graph, params, model_state, config.optim.freeze)
    function = step.make_step(
        task,
        training_graph,
        optimizer,
        partner_graphs,
        parts=config.optim.accumulate,
        ema_decay=config.optim.ema,
        constants=constants,
    )
    batch_shardings = dict.fromkeys(batch_shapes, mesh.batch_sharding(device_mesh))
    jitted = jax.jit(
        mesh.under(device_mesh, function),
        donate_argnums=0,
        in_shardings=(shardings, batch_shardings, partner_shardings),
        out_shardings=(shardings, mesh.replicated(device_mesh)),
    )
    if unread := [*configs.unread(config), *configs.unread(task.options, task.known_options)]:
        raise ValueError(
            f"{', '.join(unread)}: set, and nothing reads it with config.task.name={config.task.name} and "
            f"config.optim.name={config.optim.name}"
        )
    return Run(
        config=config,
        task=task,
        source=source,
        mesh=device_mesh,
        model=model,
        graph=graph,
        template=template,
        shardings=shardings,
        total_steps=total,
        examples=examples,
        learning_rate=learning_rate,
        step=jitted,
        initial_state=initial_state,
        fresh_metrics=jax.jit(functools.partial(step.fresh_metrics, task, parts), out_shardings=shardings.metrics),
        group_names=tuple(optimizer.group_names),
        partner_graphs=partner_graphs,
        partner_arrays=partner_arrays,
        partner_shardings=partner_shardings,
    )
