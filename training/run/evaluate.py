"""Evaluation: one compiled step for a task's metrics, run over any number of sets.

The state of all metrics stays on the devices; the host reads it once per set. Padding of the last batch is masked, so
results are exact and every process takes equally many steps. What is random is drawn for each example by its index
and its set, so results depend neither on the batch size nor on the number of processes.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import configs
import data
import models
from configs import Config
from data.kinds import spelled_size
from tasks.base import Task
from tasks.metrics import Metric
from training.checkpoints import initial
from training.distributed import hostread, mesh
from training.run import compiling, feeding
from training.run.state import Flat
from training.run.step import merge_partners
from training.run.terminal import Terminal

Results = dict[str, Any]
KEPT_REASONS = 20


def flat_results(values: Mapping[str, Any]) -> Results:
    """A metric that gives a dictionary becomes one result `name/key` for each key."""
    flat: Results = {}
    for name, value in values.items():
        flat |= {f"{name}/{key}": part for key, part in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat


def scalars(results: Mapping[str, Any]) -> dict[str, float]:
    """The results that are numbers."""
    return {name: value for name, value in results.items() if isinstance(value, int | float)}


def left_out(results: Mapping[str, Any], source: data.Source) -> str:
    """The line that says what `data.on_error=replace` left out of an evaluated set; empty if nothing."""
    if not results.get("left_out"):
        return ""
    reasons = results["left_out_reasons"]
    return (
        f"{results['left_out']} of {len(source)} examples left out (config.data.on_error=replace)"
        f"{f', the first: {reasons[0]}' if reasons else ''}"
    )


class Evaluator:
    """Compiles a task's evaluation once; each call evaluates one set with the parameters given.

    Data workers live from one of the sets that it serves to the next, and until `close`.

    Attributes:
      reasons: why examples of the set that was read last were left out, by their index, as far as this process read
        them.
      samples: arrays of the first `Task.samples` examples of the set that was evaluated last.
    """

    def __init__(
        self,
        task: Task,
        graph: Any,
        config: Config,
        device_mesh: jax.sharding.Mesh,
        partner_graphs: Mapping[str, Any],
        partner_arrays: Mapping[str, tuple[Flat, Flat]],
        terminal: Terminal | None = None,
    ):
        """Takes the task, the static part of its model, its frozen partners as `training.run.run.prepare` makes
        them, and where progress is shown.

        Raises:
          ValueError: the devices cannot share a batch equally.
        """
        self.task, self.graph, self.config, self.mesh = task, graph, config, device_mesh
        self.terminal = terminal or Terminal(quiet=True)
        self.partner_graphs, self.partner_arrays = partner_graphs, partner_arrays
        batch_size = config.eval.batch_size or config.data.batch_size
        key = "config.eval.batch_size" if config.eval.batch_size else "config.data.batch_size"
        mesh.check_batch(key, batch_size, device_mesh)
        self.batch_size = batch_size
        self.metrics, self.fit_metrics = task.metrics(), task.fit_metrics()
        self.reasons: dict[int, str] = {}
        self.samples: dict[str, np.ndarray] = {}
        self._said: set[str] = set()
        self.batch_sharding = mesh.batch_sharding(device_mesh)
        self.serving(())
        whole = mesh.replicated(device_mesh)
        self._traced = mesh.under(device_mesh, self._outputs)
        self._init = jax.jit(lambda: _fresh(self.metrics), out_shardings=whole)

        def compiled(function: Any, what: str, **options: Any) -> compiling.Ahead:
            jitted = jax.jit(mesh.under(device_mesh, function), out_shardings=whole, **options)
            return compiling.Ahead(jitted, what, self.terminal)

        self._step = compiled(self._update, "the evaluation", donate_argnums=0)
        self._fit_step = compiled(self._update_fit, "the first pass of the evaluation", donate_argnums=0)
        self._predict = compiled(self._predictions, "the prediction")
        self._generate = compiled(self._samples, "the generation")

    def changed(self, config: Config) -> Evaluator:
        """An evaluator of the same model by another configuration: transforms, batch size, task options."""
        task = self.task.changed(config)
        return Evaluator(
            task, self.graph, config, self.mesh, self.partner_graphs, self.partner_arrays, terminal=self.terminal
        )

    def _start(self, metrics: Mapping[str, Metric], info: data.Info) -> Any:
        """The states of no examples of a set."""
        if metrics is self.metrics and not any(metric.of_set for metric in metrics.values()):
            return self._init()
        make = jax.jit(lambda: _fresh(metrics, info), out_shardings=mesh.replicated(self.mesh))
        return make()

    def _outputs(self, params: Flat, model_state: Flat, batch: Mapping[str, jax.Array], partners: Any, key: Any) -> Any:
        model = models.merge(self.graph, params, model_state)
        helpers = merge_partners(self.partner_graphs, partners)
        keys = _keys(jax.random.key(0) if key is None else key, batch["index"])
        return self.task.forward(model, batch, train=False, key=keys, partners=helpers)

    def _update(
        self,
        states: Any,
        params: Flat,
        model_state: Flat,
        batch: Any,
        partners: Any,
        key: jax.Array | None = None,
        fitted: Any = None,
    ) -> tuple[Any, dict[str, jax.Array]]:
        """The states with one more batch in them, and what metrics on the host need of it."""
        outputs = self._outputs(params, model_state, batch, partners, key)
        if fitted is not None:
            outputs = self.task.compare(outputs, batch, fitted)
        found: dict[str, jax.Array] = {}
        if self.task.host_metrics():
            found = {"index": batch["index"], "valid": batch["valid"], **self.task.predictions(outputs, batch)}
        return _updated(self.metrics, states, outputs, batch), found

    def _update_fit(self, states: Any, params: Flat, model_state: Flat, batch: Any, partners: Any, key: Any) -> Any:
        return _updated(self.fit_metrics, states, self._outputs(params, model_state, batch, partners, key), batch)

    def _predictions(self, params: Flat, model_state: Flat, batch: Any, partners: Any, key: Any) -> Any:
        found = self.task.predictions(self._outputs(params, model_state, batch, partners, key), batch)
        return {"index": batch["index"], "valid": batch["valid"], **found}

    def _samples(self, params: Flat, model_state: Flat, batch: Any, partners: Any, key: jax.Array, first: Any) -> Any:
        model = models.merge(self.graph, params, model_state)
        keys = _keys(key, first + jnp.arange(self.batch_size))
        found = self.task.generate(model, batch, keys, merge_partners(self.partner_graphs, partners))
        return {"index": batch["index"], "valid": batch["valid"], **found}

    def spec(self, info: data.Info) -> dict[str, jax.ShapeDtypeStruct]:
        """Names, shapes and types of a batch of a set."""
        return {
            "index": jax.ShapeDtypeStruct((self.batch_size,), jnp.int32),
            **self.task.batch_spec(self.batch_size, train=False, info=info),
            "valid": jax.ShapeDtypeStruct((self.batch_size,), jnp.float32),
        }

    def _on_device(self, source: data.Source, complete: bool, endless: bool = False) -> Iterator[dict[str, jax.Array]]:
        spec = self.spec(source.info)
        known = [number for number, known in enumerate(self.sets) if known is source]
        if self._pool is not None and known and not endless:
            batches = self._pool.run(known[0])
        else:
            batches = feeding.eval_batches(self.config, source, self.batch_sharding, endless=endless)
        self.reasons = batches.left_out
        with batches:
            for number, batch in enumerate(batches):
                present = feeding.fields(batch, spec, source, "eval_transforms", complete, any_size=True)
                if not number:
                    self._check_size(present, source)
                yield mesh.put_batch(present, self.batch_sharding)

    def check(self, source: data.Source, fit: data.Source | None = None) -> None:
        """Refuses a set that the model cannot be evaluated on, before anything is compiled.

        Args:
          fit: the set that is seen before it.

        Raises:
          ValueError: it has other labels than the model, or transforms that the task or the model cannot take; or the
            task needs a set that it can see before, or can do nothing with one.
        """
        source = self.task.matched(source)
        name = self.config.task.name
        if fit is None and self.fit_metrics:
            raise ValueError(
                f"task {name!r} sees one set and measures on another: config.eval.fit=@train, or fit in an entry of "
                "config.eval.sets, says which it sees"
            )
        if fit is not None:
            if not self.fit_metrics:
                raise ValueError(f"config.eval.fit: task {name!r} has no use for a set that is seen before")
            self.check_example(fit)
        self.check_example(source)

    def check_example(self, source: data.Source) -> None:
        """Sends one example of a set through its transforms. ValueError for one that does not fit."""
        self._check_size(feeding.check(self.config, source, self.spec(source.info), training=False), source)

    def _check_size(self, batch: Mapping[str, np.ndarray], source: data.Source) -> None:
        """Refuses fields of another size than the model was made for, if it cannot take them."""
        spec = self.spec(source.info)
        other = {name: value.shape[1:] for name, value in batch.items() if value.shape[1:] != spec[name].shape[1:]}
        if not other:
            return
        name, shape = next(iter(other.items()))
        kind = source.info.kinds.get(name)
        given = f"{name} of {source.info.name!r} is {spelled_size(kind, shape)} after config.data.eval_transforms"
        made_for = spelled_size(kind, spec[name].shape[1:])
        shapes = {name: jax.ShapeDtypeStruct((self.batch_size, *v.shape[1:]), v.dtype) for name, v in batch.items()}
        try:
            arrays = initial.abstract_model(self.task)[2:]
            jax.eval_shape(self._traced, *arrays, shapes, self.partner_arrays, jax.random.key(0))
        except Exception as error:  # of any kind: a model says in its own way that something does not fit
            raise ValueError(
                f"{given}, and this {self.task.model_name} takes {made_for} only (for another size change "
                f"{configs.SIZE_KEY} too): {' '.join(str(error).split())[:200]}"
            ) from error
        if jax.process_index() == 0 and given not in self._said:
            self._said.add(given)
            print(f"{given}, where {configs.SIZE_KEY} asks for {made_for}", file=sys.stderr)

    def serving(self, sets: Iterable[data.Source]) -> None:
        """Takes the sets that will be evaluated, in this order; others can be too."""
        self.sets = tuple(sets)
        self._pool = feeding.eval_pool(self.config, self.sets, self.batch_sharding) if self.sets else None

    def close(self) -> None:
        """Ends the data workers; the next evaluation starts new ones."""
        if self._pool is not None:
            self._pool.close()

    def __call__(
        self,
        params: Flat,
        model_state: Flat,
        source: data.Source,
        *,
        fit: data.Source | None = None,
        most_batches: int | None = None,
    ) -> Results:
        """Evaluates one set and reads the results from the devices, once, but for what metrics on the host need.

        Args:
          fit: the set that is seen before, by `Task.fit_metrics`.
          most_batches: stop after this many batches (dry runs).

        Returns:
          Results by name; numbers are floats, the rest lists of them that JSON can hold.

        Raises:
          ValueError: the set has no examples, lacks a field, or has other labels than the model.
        """
        source = self.task.matched(source)
        fitted = None if fit is None else self._fitted(params, model_state, fit, most_batches)
        hosts = self.task.host_metrics()
        states, batches, key = self._start(self.metrics, source.info), 0, _set_key(0, source)
        for batch in self._shown(source, most_batches):
            # One batch is ahead on the devices, and no more: a signal is served, and shown progress is true.
            jax.block_until_ready(states)
            states, found = self._step(states, params, model_state, batch, self.partner_arrays, key, fitted)
            batches += 1
            if hosts:
                predictions = _without_padding(found)
                for host in hosts.values():
                    host.update(predictions, source)
        states, reasons = hostread.read(states), self.reasons
        values = {name: metric.finish(states[name]) for name, metric in self.metrics.items()}
        values |= {name: host.finish() for name, host in hosts.items()}
        if self.task.samples:
            values |= self._of_samples(params, model_state, source)
        results = flat_results(values)
        if missing := min(len(source), batches * self.batch_size) - int(states["counted"]):
            said = [reasons[index] for index in sorted(reasons)][:KEPT_REASONS]
            results |= {"left_out": missing, "left_out_reasons": said}
        return results

    def _shown(self, source: data.Source, most_batches: int | None) -> Iterator[dict[str, jax.Array]]:
        """The batches of a set on the devices, with their progress on the terminal."""
        steps = min(-(-len(source) // self.batch_size), most_batches or len(source))
        for number, batch in enumerate(itertools.islice(self._on_device(source, complete=True), most_batches)):
            self.terminal.part(f"evaluating {source.info.split}", number, steps)
            yield batch
        self.terminal.clear()

    def _fitted(self, params: Flat, model_state: Flat, source: data.Source, most_batches: int | None) -> Any:
        """The states of `Task.fit_metrics` over a set; they stay on the devices."""
        states, key = self._start(self.fit_metrics, source.info), _set_key(0, source)
        for batch in self._shown(source, most_batches):
            jax.block_until_ready(states)
            states = self._fit_step(states, params, model_state, batch, self.partner_arrays, key)
        return {name: states[name] for name in self.fit_metrics}

    def _of_samples(self, params: Flat, model_state: Flat, source: data.Source) -> dict[str, Any]:
        """Keeps what the task makes of the first examples of a set, and measures it."""
        count, generates = self.task.samples, self.task.generates
        made = self.generate(params, model_state, source, 0) if generates else self.predict(params, model_state, source)
        count = count if generates else min(count, len(source))
        parts: list[dict[str, np.ndarray]] = []
        with contextlib.closing(made):
            for part in made:
                parts.append(part)
                if sum(len(one["index"]) for one in parts) >= count:
                    break
        self.samples = {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}
        hosts = self.task.sample_metrics()
        for host in hosts.values():
            host.update(self.samples, source)
        return {name: host.finish() for name, host in hosts.items()}

    def predict(
        self, params: Flat, model_state: Flat, source: data.Source
    ) -> Generator[dict[str, np.ndarray], None, None]:
        """The task's predictions for every example of a set, in batches without padding, with `index`.

        Fields that only the loss and the metrics need, such as labels, may be absent.
        """
        key = _set_key(0, source)
        for batch in self._on_device(source, complete=False):
            yield _without_padding(self._predict(params, model_state, batch, self.partner_arrays, key))

    def generate(
        self, params: Flat, model_state: Flat, source: data.Source, seed: int
    ) -> Generator[dict[str, np.ndarray], None, None]:
        """What a generative task makes from the conditions in each example of a set, in batches with `index`, for ever:
        after the last example the first one gives another sample.
        """
        key = _set_key(seed, source)
        for number, batch in enumerate(self._on_device(source, complete=False, endless=True)):
            first = np.int32(number * self.batch_size)
            yield _without_padding(self._generate(params, model_state, batch, self.partner_arrays, key, first))


def _fresh(metrics: Mapping[str, Metric], info: data.Info | None = None) -> Any:
    """The states of no examples, and how many examples there were."""
    return {
        "counted": jnp.zeros((), jnp.int32),
        **{name: metric.of_set(info) if metric.of_set and info else metric.init() for name, metric in metrics.items()},
    }


def _updated(metrics: Mapping[str, Metric], states: Any, outputs: Any, batch: Any) -> Any:
    counted = states["counted"] + jnp.sum(batch["valid"] > 0, dtype=jnp.int32)
    return {
        "counted": counted,
        **{name: metric.update(states[name], outputs, batch) for name, metric in metrics.items()},
    }


def _set_key(seed: int, source: data.Source) -> jax.Array:
    """The randomness of a set: of its kind and split, not of where it lies."""
    kind = source.info.name.partition(":")[0]
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(f"{kind}@{source.info.split}".encode()))


def _keys(key: jax.Array, numbers: jax.Array) -> jax.Array:
    """One key for each example, `[B]`."""
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)


def _without_padding(found: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    arrays = hostread.read(found)
    valid = arrays.pop("valid") > 0
    return {name: value[valid] for name, value in arrays.items()}
