"""One optimizer step as a pure function: forward, backward, update, averages and health, for any task and any model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import models
from tasks.base import Task
from tasks.losses import total
from training.optim import ema as averages
from training.optim import gradients as norms
from training.optim import optim
from training.run import gradients as backward
from training.run import health
from training.run.state import Flat, TrainState


def merge_partners(graphs: Mapping[str, Any], arrays: Mapping[str, tuple[Flat, Flat]]) -> dict[str, Any]:
    """Frozen partner models from their static part and their arrays."""
    return {name: models.merge(graphs[name], *arrays[name]) for name in graphs}


def make_step(
    task: Task,
    graph: Any,
    optimizer: optim.Optimizer,
    partner_graphs: Mapping[str, Any],
    *,
    parts: int,
    ema_decay: float,
    constants: Mapping[str, Any] | None = None,
) -> Callable[[TrainState, Mapping[str, jax.Array], Any], tuple[TrainState, jax.Array]]:
    """Builds `step(state, batch, partners) -> (state, done)`.

    `done` is a scalar to wait for, never to read: the state itself is donated to the next step.

    A step that is not finite (`training/run/health.py`) changes nothing but `step` and `health`; the loop decides
    whether to go on. To look at what a step would leave behind before anything is overwritten, the compiled program
    computes the element-wise update twice: it reads parameters and moments once more, and keeps no second copy.

    Args:
      parts: the batch is split into this many parts whose gradients are averaged; part i takes examples i, i +
        parts, ... so that every device keeps its own examples.
      ema_decay: decay of the moving average; 0 keeps none.
      constants: state that the graph has besides that of the run, by name; it never changes.
    """
    train_metrics, losses, fixed = task.train_metrics(), task.losses(), dict(constants or {})

    def forward(params: Flat, model_state: Flat, batch: Any, key: jax.Array, partners: Any):
        model = models.merge(graph, params, {**model_state, **fixed})
        outputs = task.forward(model, batch, train=True, key=key, partners=partners)
        after = {name: value for name, value in models.split(model)[2].items() if name not in fixed}
        return outputs, after

    if losses:
        gradient_of = backward.of_several(losses, optimizer.trained_by, forward)
    else:
        gradient_of = backward.of_one(task, forward)

    def part(params: Flat, model_state: Flat, sums: Any, batch: Any, key: jax.Array, partners: Any, due: backward.Due):
        """Loss, its named parts and gradients of some examples, the model state after them, and metric sums."""
        (loss, (model_state, scalars, outputs)), grads = gradient_of(params, model_state, batch, key, partners, due)
        sums = {name: metric.update(sums[name], outputs, batch) for name, metric in train_metrics.items()}
        return loss, scalars, grads, model_state, sums

    def gradients(state: TrainState, batch: Any, key: jax.Array, partners: Any, due: backward.Due):
        """What `part` gives for the whole batch: means over the parts, and the model state after the last one."""
        sums = {name: metric.init() for name, metric in train_metrics.items()}
        if parts == 1:
            return part(state.params, state.model_state, sums, batch, key, partners, due)

        def accumulate(carry: tuple, inputs: tuple):
            (total, model_state, sums), (piece, piece_key) = carry, inputs
            loss, scalars, grads, model_state, sums = part(
                state.params, model_state, sums, piece, piece_key, partners, due
            )
            return (jax.tree.map(jnp.add, total, grads), model_state, sums), (loss, scalars)

        pieces = {k: jnp.moveaxis(v.reshape(v.shape[0] // parts, parts, *v.shape[1:]), 1, 0) for k, v in batch.items()}
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(parts))
        start = (jax.tree.map(jnp.zeros_like, state.params), state.model_state, sums)
        (total, model_state, sums), means = jax.lax.scan(accumulate, start, (pieces, keys))
        loss, scalars = jax.tree.map(lambda values: values.mean(0), means)
        return loss, scalars, jax.tree.map(lambda g: g / parts, total), model_state, sums

    def step(state: TrainState, batch: Mapping[str, jax.Array], partner_arrays: Any) -> tuple[TrainState, jax.Array]:
        partners = merge_partners(partner_graphs, partner_arrays)
        prepare_key, forward_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        prepared = task.prepare(batch, prepare_key)
        due = {name: loss.due(state.step) for name, loss in losses.items()}
        loss, scalars, grads, model_state, sums = gradients(state, prepared, forward_key, partners, due)
        updates, opt_state, aux = optimizer.update(grads, state.opt_state, state.params, due)
        params = {name: value + updates[name].astype(value.dtype) for name, value in state.params.items()}
        bad_loss = ~jnp.isfinite(loss)
        bad_params = norms.overflowed_groups(params, optimizer.group_names)
        overflow = bad_params.any() | ~norms.all_finite((opt_state, model_state))
        good = ~bad_loss & ~aux.bad_groups.any() & ~overflow
        ema = {}
        if ema_decay:
            now = {"params": params, "model_state": model_state}
            ema = averages.update_ema(state.ema, now, state.step, ema_decay)

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

        noted = health.noted(
            state.health,
            state.step,
            loss=bad_loss,
            gradients=aux.bad_groups,
            update=overflow,
            params=bad_params,
        )
        scalars = {"loss": loss, **scalars, "grad_norm": aux.grad_norm}
        means = state.metrics["means"]
        metrics = {
            "count": state.metrics["count"] + good,
            "means": {name: means[name] + jnp.where(good, value, 0.0) for name, value in scalars.items()},
            "task": {
                name: metric.merge(state.metrics["task"][name], keep(sums[name], metric.init()))
                for name, metric in train_metrics.items()
            },
        }
        after = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            model_state=keep(model_state, state.model_state),
            opt_state=keep(opt_state, state.opt_state),
            ema=keep(ema, state.ema),
            key=state.key,
            health=noted,
            metrics=metrics,
        )
        return after, after.step.astype(jnp.float32)

    return step


def loss_parts(
    task: Task, graph: Any, params: Any, model_state: Any, batch: Any, partner_graphs: Any, partner_arrays: Any
) -> list[str]:
    """Names of the scalars that there are besides the loss, such as those of several losses, found by tracing the task
    without running it.
    """
    losses = task.losses()

    def trace(params: Any, model_state: Any, batch: Any, arrays: Any):
        key = jax.random.key(0)
        partners = merge_partners(partner_graphs, arrays)
        batch = task.prepare(batch, key)
        outputs = task.forward(models.merge(graph, params, model_state), batch, train=True, key=key, partners=partners)
        return (total(losses, outputs, batch) if losses else task.loss(outputs, batch))[1]

    return list(jax.eval_shape(trace, params, model_state, batch, partner_arrays))


def fresh_metrics(task: Task, parts: Sequence[str]) -> dict[str, Any]:
    """Zeroed sums for the log: of the loss, its named `parts`, the gradient norm and the task's own metrics."""
    return {
        "count": jnp.zeros((), jnp.int32),
        "means": {name: jnp.zeros((), jnp.float32) for name in ["loss", *parts, "grad_norm"]},
        "task": {name: metric.init() for name, metric in task.train_metrics().items()},
    }


def finish_metrics(task: Task, sums: Mapping[str, Any]) -> dict[str, float | None]:
    """Means since the last log line, on the host; None for all of them if every step since was skipped."""
    count, metrics = int(sums["count"]), task.train_metrics()
    if not count:
        return dict.fromkeys([*sums["means"], *metrics])
    out: dict[str, float | None] = {name: float(value) / count for name, value in sums["means"].items()}
    for name, metric in metrics.items():
        out[name] = float(metric.finish(sums["task"][name]))
    return out
