"""Evaluation: one compiled step for a task's metrics, run over any number of sets.

The state of all metrics stays on the devices; the host reads it once per set. Padding of the last batch is masked, so
results are exact and every process takes equally many steps. What is random is drawn for each example by its index
and its set, so results depend neither on the batch size nor on the number of processes.
"""

from __future__ import annotations

import itertools
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

import data
import models
from configs import Config
from data import classes
from data.split import usual_name
from tasks.base import Task
from training.checkpoints import initial
from training.distributed import hostread, mesh
from training.run import compiling, feeding
from training.run.log import Terminal
from training.run.state import Flat
from training.run.step import merge_partners

Results = dict[str, Any]
KEPT_REASONS = 20


def set_names(config: Config) -> dict[str, tuple[str, str]]:
    """The evaluation sets of a configuration, `{label: (source, split)}`: `data.eval_split` first, then `eval.sets`.

    An entry of `eval.sets` is `label=source@split`; an empty source is `data.name`, as in `train=@train[:500]`.

    Raises:
      ValueError: an entry that cannot be read, or a label that is used twice.
    """
    sets = {re.sub(r"[^\w.-]+", "_", config.data.eval_split).strip("_"): (config.data.name, config.data.eval_split)}
    for entry in config.eval.sets:
        label, equals, place = entry.partition("=")
        source, at, split = place.rpartition("@")
        if not (equals and at and split and re.fullmatch(r"[\w.-]+", label)):
            raise ValueError(
                f"config.eval.sets: {entry!r} is not 'label=source@split', such as 'train=digits@train[:500]' "
                "(label: letters, digits, '_', '-', '.'; an empty source is data.name)"
            )
        if label in sets:
            raise ValueError(f"config.eval.sets: the label {label!r} is used twice; there is {', '.join(sets)}")
        sets[label] = (source or config.data.name, split)
    return sets


def open_sets(config: Config, sources: Mapping[str, data.Source] | None = None) -> dict[str, data.Source]:
    """The data sources to evaluate on, by label.

    Args:
      sources: in place of those that the configuration names; all but `"train"` are evaluation sets.
    """
    if sources is not None:
        return {label: source for label, source in sources.items() if label != "train"}
    return {label: feeding.open_source(config, name, split) for label, (name, split) in set_names(config).items()}


def notes(config: Config, sets: Mapping[str, data.Source]) -> list[str]:
    """What to know of the evaluation sets of a run: that one lacks classes, that checkpoints are chosen on a test set.

    Args:
      sets: by label; the first is the one that checkpoints are chosen on.
    """
    found = [note for source in sets.values() for note in source.info.notes]
    info = next(iter(sets.values())).info if sets else None
    if info is not None and config.checkpoint.keep_best:
        spare = next((name for name in info.splits if usual_name(name) == "val"), None)
        if spare and {usual_name(part.partition("[")[0].strip()) for part in info.split.split("+")} == {"test"}:
            found.append(
                f"the best checkpoints are chosen on the split {info.split!r} of {info.name}; to keep it for the end, "
                f"choose on {spare!r}: --config.data.eval_split={spare}"
            )
    return found


def in_classes_of(task: Task, source: data.Source) -> data.Source:
    """The set with the labels of the model: matched by name, where both have names. It may have fewer classes.

    Raises:
      ValueError: it has a class that the model lacks or, without names, another number of them.
    """
    return classes.labelled_as(source, task.info)


def check_classes(task: Task, sets: Mapping[str, data.Source]) -> list[str]:
    """Refuses a set with classes that the model lacks.

    Returns:
      A sentence for each set whose labels are not simply the model's.

    Raises:
      ValueError: see `in_classes_of`.
    """
    count = task.info.num_classes or 0
    found = {label: classes.described(classes.places(source.info, task.info), count) for label, source in sets.items()}
    return [f"{label} ({sets[label].info.name}): {said}" for label, said in found.items() if said]


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

    Data workers live from one of the `sets` to the next and until `close`.

    Attributes:
      reasons: why examples of the set that was read last were left out, by their index, as far as this process read
        them.
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
        sets: Iterable[data.Source] = (),
    ):
        """Takes the task, the static part of its model, its frozen partners as `training.run.run.prepare` makes
        them, and where progress is shown.

        Args:
          sets: what will be evaluated, in this order; others can be too.

        Raises:
          ValueError: the devices cannot share a batch equally, or a set is empty.
        """
        self.task, self.graph, self.config = task, graph, config
        self.terminal = terminal or Terminal(quiet=True)
        self.partner_graphs, self.partner_arrays = partner_graphs, partner_arrays
        batch_size = config.eval.batch_size or config.data.batch_size
        key = "config.eval.batch_size" if config.eval.batch_size else "config.data.batch_size"
        mesh.check_batch(key, batch_size, device_mesh)
        self.batch_size = batch_size
        self.metrics = task.metrics()
        self.reasons: dict[int, str] = {}
        self._said: set[str] = set()
        self.batch_sharding = mesh.batch_sharding(device_mesh)
        self.serving(sets)
        whole = mesh.replicated(device_mesh)
        self._traced = mesh.under(device_mesh, self._outputs)
        self._init = jax.jit(self._fresh, out_shardings=whole)

        def compiled(function: Any, what: str, **options: Any) -> compiling.Ahead:
            jitted = jax.jit(mesh.under(device_mesh, function), out_shardings=whole, **options)
            return compiling.Ahead(jitted, what, self.terminal)

        self._step = compiled(self._update, "the evaluation", donate_argnums=0)
        self._predict = compiled(self._predictions, "the prediction")
        self._generate = compiled(self._samples, "the generation")

    def _fresh(self) -> Any:
        return {"counted": jnp.zeros((), jnp.int32), **{name: metric.init() for name, metric in self.metrics.items()}}

    def _outputs(self, params: Flat, model_state: Flat, batch: Mapping[str, jax.Array], partners: Any, key: Any) -> Any:
        model = models.merge(self.graph, params, model_state)
        helpers = merge_partners(self.partner_graphs, partners)
        keys = _keys(jax.random.key(0) if key is None else key, batch["index"])
        return self.task.forward(model, batch, train=False, key=keys, partners=helpers)

    def _update(
        self, states: Any, params: Flat, model_state: Flat, batch: Any, partners: Any, key: jax.Array | None = None
    ) -> Any:
        outputs = self._outputs(params, model_state, batch, partners, key)
        counted = states["counted"] + jnp.sum(batch["valid"] > 0, dtype=jnp.int32)
        updated = {name: metric.update(states[name], outputs, batch) for name, metric in self.metrics.items()}
        return {"counted": counted, **updated}

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

    def check(self, source: data.Source) -> None:
        """Refuses a set that the model cannot be evaluated on, before anything is compiled.

        Raises:
          ValueError: it has another number of classes, or transforms that the task or the model cannot take.
        """
        source = in_classes_of(self.task, source)
        self._check_size(feeding.check(self.config, source, self.spec(source.info), training=False), source)

    def _check_size(self, batch: Mapping[str, np.ndarray], source: data.Source) -> None:
        """Refuses images of another size than the model was made for, if it cannot take them."""
        spec = self.spec(source.info)
        other = {name: value.shape[1:] for name, value in batch.items() if value.shape[1:] != spec[name].shape[1:]}
        if not other:
            return
        name, (height, width, *_) = next(iter(other.items()))
        given = f"{name} of {source.info.name!r} is {height}x{width} after config.data.eval_transforms"
        made_for = "x".join(map(str, spec[name].shape[1:3]))
        shapes = {name: jax.ShapeDtypeStruct((self.batch_size, *v.shape[1:]), v.dtype) for name, v in batch.items()}
        try:
            arrays = initial.abstract_model(self.task)[2:]
            jax.eval_shape(self._traced, *arrays, shapes, self.partner_arrays, jax.random.key(0))
        except Exception as error:  # of any kind: a model says in its own way that something does not fit
            raise ValueError(
                f"{given}, and this {self.config.model.name} takes {made_for} only (for another size change "
                f"config.data.image_size too): {' '.join(str(error).split())[:200]}"
            ) from error
        if jax.process_index() == 0 and given not in self._said:
            self._said.add(given)
            print(f"{given}, where config.data.image_size asks for {made_for}", file=sys.stderr)

    def serving(self, sets: Iterable[data.Source]) -> Self:
        """Takes other `sets`, and returns itself."""
        self.sets = tuple(sets)
        self._pool = feeding.eval_pool(self.config, self.sets, self.batch_sharding) if self.sets else None
        return self

    def close(self) -> None:
        """Ends the data workers; the next evaluation starts new ones."""
        if self._pool is not None:
            self._pool.close()

    def __call__(
        self, params: Flat, model_state: Flat, source: data.Source, *, most_batches: int | None = None
    ) -> Results:
        """Evaluates one set and reads the results from the devices, once.

        Args:
          most_batches: stop after this many batches (dry runs).

        Returns:
          Results by name; numbers are floats, the rest lists of them that JSON can hold.

        Raises:
          ValueError: the set has no examples, lacks a field, or has other classes than the model.
        """
        source = in_classes_of(self.task, source)
        states, batches, key = self._init(), 0, _set_key(0, source)
        steps = min(-(-len(source) // self.batch_size), most_batches or len(source))
        for batch in itertools.islice(self._on_device(source, complete=True), most_batches):
            # One batch is ahead on the devices, and no more: a signal is served, and shown progress is true.
            jax.block_until_ready(states)
            self.terminal.part(f"evaluating {source.info.split}", batches, steps)
            states = self._step(states, params, model_state, batch, self.partner_arrays, key)
            batches += 1
        self.terminal.clear()
        states = hostread.read(states)
        results = flat_results({name: metric.finish(states[name]) for name, metric in self.metrics.items()})
        if missing := min(len(source), batches * self.batch_size) - int(states["counted"]):
            reasons = [self.reasons[index] for index in sorted(self.reasons)][:KEPT_REASONS]
            results |= {"left_out": missing, "left_out_reasons": reasons}
        return results

    def predict(self, params: Flat, model_state: Flat, source: data.Source) -> Iterator[dict[str, np.ndarray]]:
        """The task's predictions for every example of a set, in batches without padding, with `index`.

        Fields that only the loss and the metrics need, such as labels, may be absent.
        """
        key = _set_key(0, source)
        for batch in self._on_device(source, complete=False):
            yield _without_padding(self._predict(params, model_state, batch, self.partner_arrays, key))

    def generate(
        self, params: Flat, model_state: Flat, source: data.Source, seed: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """What a generative task makes from the conditions in each example of a set, in batches with `index`, for ever:
        after the last example the first one gives another sample.
        """
        key = _set_key(seed, source)
        for number, batch in enumerate(self._on_device(source, complete=False, endless=True)):
            first = np.int32(number * self.batch_size)
            yield _without_padding(self._generate(params, model_state, batch, self.partner_arrays, key, first))


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
