"""What a task is: everything that the training loop, the evaluator and the checkpoint do not know.

The loop knows steps, parameters and devices. The task knows the fields of a batch, how the model is called with them,
what is minimised and what is measured. A new task is a subclass of `Task` in one file; nothing in `training/` changes
for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

import configs
import errors
import models
import naming
from configs import Config, Field
from tasks.losses import Loss, total
from tasks.metrics import HostMetric, Metric, mean
from tasks.terms import Terms

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    import data

Batch = Mapping[str, jax.Array]
Outputs = Mapping[str, jax.Array]
Partners = Mapping[str, nnx.Module]


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image among predictions: `pixels` [Y, X] or [Y, X, 1 or 3], uint8, or float from 0 to 1."""

    pixels: np.ndarray

    def rounded(self) -> np.ndarray:
        """The pixels as uint8, [Y, X] or [Y, X, 3]; values outside 0 to 1 are clipped."""
        pixels = np.asarray(self.pixels)
        if pixels.dtype != np.uint8:
            pixels = np.round(255 * np.clip(np.nan_to_num(pixels.astype(np.float32)), 0, 1)).astype(np.uint8)
        return pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels

    def save(self, path: Path) -> None:
        """Writes a file of the format that the name says."""
        Image.fromarray(self.rounded()).save(path)


@dataclasses.dataclass(frozen=True)
class Chart:
    """One picture of the evaluation report: a heading, a caption that says how to read it, and the figure."""

    title: str
    caption: str
    figure: Figure


def _missing(task: Task, method: str) -> errors.BadInput:
    return errors.BadInput(f"task {type(task).__name__}: has no {method}; a task overrides it where it is asked for")


class Task(Terms):
    """Base class; what data and weights of elsewhere mean to it stands in `Terms`. B is the number of examples of a
    batch; a batch is a dictionary of arrays whose first axis is B.

    Every batch carries `index` `[B]` (integer example id); a batch of an evaluation also carries `valid` `[B]` (1, or
    0 for the padding of the last batch), which every metric and every mean has to respect
    (`tasks.metrics.example_weights`).

    `prepare`, `forward`, `loss`, `predictions` and the updates of the metrics run inside `jax.jit`; they may not read
    values.

    Attributes:
      trains: False for a task that has nothing to learn: `train.py` refuses it and it runs under `eval.py` alone.
      best_metric: the result that chooses the best checkpoint and whether `"max"` or `"min"` is better.
      inputs: the fields of a batch that a model needs for an answer, by which it is summed up, planned and exported.
      columns: the results shown in the table on the terminal, in this order; empty shows every scalar result.
      known_options: what `config.task.options` takes, each with its default, meaning and bounds; `self.options` holds
        their values, checked.
      unit: what speed is counted in, such as `"tokens"`, of which an example has `units_per_example`.
      samples: how many examples of a set its report shows: what the model predicts for the first ones or, if the task
        generates, what it makes for them.
      couples_batch: True where the loss of a batch is not the mean of the losses of its parts, because it compares
        examples with each other (contrastive losses) or divides by a number of the whole batch; such a batch cannot be
        taken in parts (`config.optim.accumulate`). `prepare` always has the whole batch, and may mix its examples.
    """

    trains: ClassVar[bool] = True
    best_metric: ClassVar[tuple[str, Literal["max", "min"]]] = ("loss", "min")
    inputs: ClassVar[tuple[str, ...]] = ("image",)
    columns: ClassVar[tuple[str, ...]] = ()
    known_options: ClassVar[Mapping[str, Field]] = {}
    unit: ClassVar[str] = "images"
    samples: ClassVar[int] = 0
    couples_batch: ClassVar[bool] = False

    def __init__(self, config: Any, info: Any):
        """Keeps the whole configuration (attribute access), what the data source says of itself (`Source.info`) and
        the task's own options.

        Raises:
          ValueError: an option that the task does not have, or a value that it does not take.
        """
        self.config = config
        self.info = info
        self.options: Config = configs.build(self.known_options, config.task.options, "task.options.")

    def changed(self, config: Config) -> Task:
        """The same task by another configuration, for an evaluation set with options of its own."""
        return type(self)(config, self.info)

    @property
    def generates(self) -> bool:
        """Whether the task makes samples (`generate`)."""
        return type(self).generate is not Task.generate

    # What it is called and counted in ---------------------------------------------------------------------------------

    @property
    def model_name(self) -> str:
        """What the model is called in headlines and results."""
        return self.config.model.name if type(self).build_model is Task.build_model else type(self).__name__

    def units_per_example(self) -> float:
        """How many of `unit` an example has."""
        return 1

    def progress(self) -> tuple[str, ...]:
        """The values of a row of the training log that the terminal shows beside the loss; default: those of the first
        two `train_metrics`.
        """
        return tuple(self.train_metrics())[:2]

    # Model and data ---------------------------------------------------------------------------------------------------

    def build_model(self, rngs: nnx.Rngs) -> nnx.Module:
        """A freshly initialised model by `config.model`; its outputs are the classes of the data source."""
        model, precision = self.config.model, self.config.train.precision
        known = models.options_of_model(model.name)
        always = {
            "num_classes": self.info.num_classes,
            "image_size": self.config.data.image_size,
            "dtype": jnp.dtype(precision),
            "scan": model.scan,
            "remat": model.remat,
        }
        # What says nothing is not said: a model need not have every option.
        said = {"attention": model.attention, "drop_path": model.drop_path, "dropout": model.dropout}
        wanted = {"dtype": precision != "float32", "remat": model.remat != "auto"}
        return models.create(
            model.name,
            rngs=rngs,
            **{name: value for name, value in always.items() if name in known or wanted.get(name)},
            **{name: value for name, value in said.items() if value},
            **model.options,
        )

    def batch_spec(
        self, batch_size: int, *, train: bool, info: data.Info | None = None
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Names, shapes and types of a batch: what is compiled, and what a data source has to deliver.

        The default is an image batch: `image` `[B, Y, X, C]` float32 with (Y, X) = `config.data.image_size` and the
        channels that the model takes (`config.model.options.channels`, or 3), and `index` `[B]` int32.

        Args:
          train: of a training batch, or of one of an evaluation; the two may differ in fields and shapes.
          info: what the set says of itself whose batches these are; None for the training set (`self.info`).
        """
        height, width = configs.pair(self.config.data.image_size)
        channels = self.config.model.options.get("channels", 3)
        return {
            "image": jax.ShapeDtypeStruct((batch_size, height, width, channels), jnp.float32),
            "index": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        }

    def example_inputs(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields of a batch that answering takes, with their shapes: those named by `inputs`.

        Headline, plan and export call the model with them, as `answer` does.
        """
        spec = self.batch_spec(batch_size, train=False)
        if missing := [name for name in self.inputs if name not in spec]:
            raise ValueError(
                f"task {type(self).__name__}: inputs names {missing[0]!r}; batch_spec has {', '.join(spec)}"
            )
        return {name: spec[name] for name in self.inputs}

    def answer(self, model: nnx.Module, inputs: Batch) -> Any:
        """What the model says to the fields that `inputs` names: the outputs of `forward` in an evaluation, without
        their name where it is one. What is random is drawn by the place in the batch.
        """
        places = jnp.arange(next(iter(inputs.values())).shape[0])  # a size that may be symbolic
        keys = jax.vmap(lambda place: jax.random.fold_in(jax.random.key(0), place))(places)
        outputs = self.forward(model, inputs, train=False, key=keys, partners={})
        return next(iter(outputs.values())) if len(outputs) == 1 else dict(outputs)

    def partners(self, load: Callable[..., nnx.Module], *, train: bool = True) -> dict[str, nnx.Module]:
        """Frozen helpers by name, such as a teacher.

        `load(path)` gives the trained model of a working directory, a checkpoint or `CONFIG.py:FILE` of official
        weights, so a task needs to know nothing about files. It is in the terms of this run (`Terms.partner`, which
        takes further arguments of `load`): it takes images as this run has them, and answers in the classes of its
        data; with `load(path, match_classes=False)` in its own. The arrays of partners enter the
        compiled step as arguments; they are never updated, averaged or saved. With `train=False` only those that an
        evaluation needs are loaded: a teacher, for one, may be gone by then.
        """
        del load, train
        return {}

    def optimizers(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """`{label: (regular expression over unrolled parameter names, keys of config.optim to change)}`.

        A parameter takes the first label whose expression is found in its name, and `config.optim` unchanged if none
        is. The default `{}` is one optimizer for all parameters.
        """
        return {}

    # Inside the compiled step -----------------------------------------------------------------------------------------

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        """The batch after augmentation on the device (training only), such as mixup; it may get further fields."""
        del key
        return batch

    def forward(
        self, model: nnx.Module, batch: Batch, *, train: bool, key: jax.Array | None, partners: Partners
    ) -> Outputs:
        """Calls the model with the fields of the batch that it takes.

        Args:
          model: the merged model; with `train=True` it may keep new batch statistics, which the loop reads from it
            afterwards.
          batch: named arrays, `[B, ...]`.
          train: whether dropout, drop path and batch statistics are on.
          key: randomness of this call; in evaluation one key for each example, `[B]`, so that what is drawn by
            `jax.vmap` over them does not depend on the batch.
          partners: what `partners` returned.

        Returns:
          Named arrays, each `[B, ...]`, read by `loss`, `metrics` and `predictions`.
        """
        raise _missing(self, "forward")

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The scalar to minimise, a mean over the valid examples, and its named parts (scalars, for the log).

        The default is the sum of `losses`, by which a task that has several is logged and evaluated.
        """
        if not (losses := self.losses()):
            raise _missing(self, "loss (or losses)")
        return total(losses, outputs, batch)

    def losses(self) -> dict[str, Loss]:
        """Several losses by name, each of which trains parameters of its own; `{}` is one, `loss`, that trains all."""
        return {}

    def predictions(self, outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
        """What the model says about each example, by name, each `[B, ...]`: what `eval.py --predict` writes."""
        raise _missing(self, "predictions")

    def generate(self, model: nnx.Module, batch: Batch, key: jax.Array, partners: Partners) -> dict[str, jax.Array]:
        """Samples from a generative model given the conditions in the batch: named arrays, each `[B, ...]`.

        `key` `[B]` has one for each sample: `jax.vmap(lambda own: jax.random.normal(own, (8,)))(key)`.
        """
        raise ValueError(f"task {type(self).__name__} does not generate; tasks that do override Task.generate")

    # Measuring --------------------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, Metric]:
        """What an evaluation measures. The default is the mean of `loss`."""
        return {"loss": mean(lambda outputs, batch: self.loss(outputs, batch)[0])}

    def train_metrics(self) -> dict[str, Metric]:
        """Cheap metrics that the training step gathers between two log lines; the loss needs none."""
        return {}

    def host_metrics(self) -> dict[str, HostMetric]:
        """Metrics on the host over the `predictions` of every example; new ones at every call."""
        return {}

    def sample_metrics(self) -> dict[str, HostMetric]:
        """The same over the first `samples` examples, or what was generated for them."""
        return {}

    def fit_metrics(self) -> dict[str, Metric]:
        """What is gathered on one set before another is measured (`config.eval.fit`), such as the features of all
        examples for a nearest-neighbour classifier. Only the states count; they stay on the devices.
        """
        return {}

    def compare(self, outputs: Outputs, batch: Batch, fitted: Mapping[str, Any]) -> Outputs:
        """The outputs once the states of `fit_metrics` are known; runs inside `jax.jit`, before the metrics."""
        del batch, fitted
        return outputs

    # Showing ----------------------------------------------------------------------------------------------------------

    def report(self, results: Mapping[str, Any], source: Any, samples: Mapping[str, np.ndarray]) -> list[Chart]:
        """Pictures for the HTML report of one evaluated set.

        Args:
          results: of the metrics.
          source: the set, for its images.
          samples: arrays of the first `samples` examples by name, each `[n, ...]`, with their `index`.
        """
        del results, source, samples
        return []

    def tables(self, results: Mapping[str, Any]) -> dict[str, tuple[tuple[str, ...], list[tuple[Any, ...]]]]:
        """`(columns, rows)` by name, of what was measured on a set, for TensorBoard and Weights & Biases; cells are
        text, numbers or None.
        """
        del results
        return {}

    def pictures(self, results: Mapping[str, Any], source: Any) -> list[tuple[str, Picture]]:
        """Pictures of single examples of an evaluated set with their captions, for the same."""
        del results, source
        return []

    def written(self, prediction: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """One example's predictions as `eval.py --predict` writes them.

        Text and numbers become columns of a CSV file, a `Picture` a PNG file; where there is anything else (lists,
        dictionaries), all become lines of JSON. The default writes every array as it is.
        """
        return {name: value.tolist() for name, value in prediction.items()}


_REGISTRY: dict[str, type[Task]] = {}


def register(name: str) -> Callable[[type[Task]], type[Task]]:
    """Class decorator that makes a task known as `config.task.name=name`. Raises ValueError for a taken name."""

    def add(task: type[Task]) -> type[Task]:
        if name in _REGISTRY:
            raise ValueError(f"task {name!r} is already registered by {_REGISTRY[name].__qualname__}")
        _REGISTRY[name] = task
        return task

    return add


def names() -> list[str]:
    """The names of all registered tasks, sorted."""
    return sorted(_REGISTRY)


def find(name: str) -> type[Task]:
    """The class of the task of that name, or of a module of the user's, `package.module:Class`.

    Raises:
      ValueError: a name that nobody registered, or no such class; the message names the nearest.
    """
    if naming.is_outside(name):
        found = naming.load(name, "config.task.name")
        if not (isinstance(found, type) and issubclass(found, Task)):
            raise ValueError(f"config.task.name={name!r}: takes a subclass of tasks.Task, this is {found!r}")
        return found
    if name not in _REGISTRY:
        near = naming.hint(name, _REGISTRY)
        raise ValueError(f"config.task.name={name!r}: there are {', '.join(names())}, or module:Class{near}")
    return _REGISTRY[name]


def create(config: Config, info: Any) -> Task:
    """The task that `config.task` describes, for data that says `info` of itself.

    Raises:
      ValueError: a name that nobody registered, or an option that the task does not have or take.
    """
    return find(config.task.name)(config, info)
