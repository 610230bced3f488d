"""Metrics as four functions, `(init, update, merge, finish)`, that are exact over padded batches, shards and processes.

A state is a pytree of arrays with fixed shapes. `update` and `merge` run on the device; `finish` runs once, on the
host, with NumPy arrays. `merge` is associative and commutative (up to the rounding of float sums) and `init()` is its
neutral element, so it does not matter how the examples were cut into batches. Calibration has a file of its own,
`tasks/calibration.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

State = Any


@dataclasses.dataclass(frozen=True)
class Metric:
    """The four functions of a metric.

    Attributes:
      init: `() -> state`, the state of no examples.
      update: `(state, outputs, batch) -> state` with one more batch in it; padded examples (`valid` = 0) change
        nothing.
      merge: `(state, state) -> state` of both sets of examples.
      finish: `(state of NumPy arrays) -> result`, a float, or lists and dictionaries of them that JSON can hold.
      of_set: `(Source.info) -> state` in place of `init` where the state depends on the set: a row for each of its
        examples, what is known of its noise.
    """

    init: Callable[[], State]
    update: Callable[[State, Mapping[str, Array], Mapping[str, Array]], State]
    merge: Callable[[State, State], State]
    finish: Callable[[State], Any]
    of_set: Callable[[Any], State] | None = None


class HostMetric(Protocol):
    """A metric on the host, over what the model predicted or made: strings, sets, sequences of any length.

    One object is made for each evaluation of a set; with several processes each of them sees all examples.
    """

    def update(self, predictions: Mapping[str, np.ndarray], source: Any) -> None:
        """Takes some more examples.

        Args:
          predictions: what `Task.predictions` or `Task.generate` gave, each `[b, ...]` without padding, and `index`
            `[b]`, the examples' places in the source.
          source: the set, whose records (`source[index]`) hold what should have come out.
        """

    def finish(self) -> Any:
        """The result: a float, or lists and dictionaries of them that JSON can hold."""


def example_weights(batch: Mapping[str, Array]) -> Float[Array, " B"]:
    """Weight of each example: `batch["valid"]`, or one for every example of a training batch, which has no padding."""
    if "valid" in batch:
        return jnp.asarray(batch["valid"], jnp.float32)
    return jnp.ones(next(iter(batch.values())).shape[0], jnp.float32)


def weighted_sum(values: Float[Array, " B"], weights: Float[Array, " B"]) -> Float[Array, ""]:
    """Sum of `values * weights` in which an example of weight zero may hold anything, NaN included."""
    return jnp.sum(jnp.where(weights > 0, values.astype(jnp.float32) * weights, 0.0))


def weighted_mean(values: Float[Array, " B"], batch: Mapping[str, Array]) -> Float[Array, ""]:
    """Mean over the valid examples of a batch; zero for a batch that is all padding."""
    weights = example_weights(batch)
    return weighted_sum(values, weights) / jnp.maximum(jnp.sum(weights), 1.0)


def add_states(left: State, right: State) -> State:
    """The `merge` of every state that is made of sums."""
    return jax.tree.map(jnp.add, left, right)


def ratio(numerator: Any, denominator: Any) -> float:
    """Their quotient as a float, NaN for no examples."""
    return float(numerator) / float(denominator) if float(denominator) else float("nan")


def mean(values: Callable[[Mapping[str, Array], Mapping[str, Array]], Array]) -> Metric:
    """Mean over the examples of `values(outputs, batch)`: one number an example `[B]`, or a scalar that is already
    the mean over the valid examples of the batch."""

    def init() -> State:
        return {"sum": jnp.zeros((), jnp.float32), "weight": jnp.zeros((), jnp.float32)}

    def update(state: State, outputs: Mapping[str, Array], batch: Mapping[str, Array]) -> State:
        weights = example_weights(batch)
        value = jnp.broadcast_to(values(outputs, batch), weights.shape)
        return add_states(state, {"sum": weighted_sum(value, weights), "weight": jnp.sum(weights)})

    return Metric(init, update, add_states, lambda state: ratio(state["sum"], state["weight"]))


def label_rank(logits: Float[Array, "B C"], label: Int[Array, " B"]) -> Int[Array, " B"]:
    """Position of the label when classes are sorted by logit, 0 for the best.

    Among equal logits the lower class comes first, as in `argmax`, so a model that gives every class the same logit
    earns no more than chance; a NaN counts as better than any number, so NaN logits never make a prediction right.
    """
    own = jnp.take_along_axis(logits, label[:, None], axis=1)
    classes = jnp.arange(logits.shape[1])
    ahead = ~(logits <= own) | ((logits == own) & (classes < label[:, None]))
    return jnp.sum(ahead, axis=1)


def top_k_accuracy(k: int, logits: str = "logits", label: str = "label") -> Metric:
    """Fraction of the examples whose label is among the k largest logits."""
    return mean(lambda outputs, batch: (label_rank(outputs[logits], batch[label]) < k).astype(jnp.float32))


def _valid(batch: Mapping[str, Array]) -> Bool[Array, " B"]:
    return example_weights(batch) > 0


def per_class_accuracy(num_classes: int, logits: str = "logits", label: str = "label") -> Metric:
    """Top-1 accuracy among the examples of each class: `{"accuracy": [C] (None for a class without examples),
    "count": [C]}`."""

    def init() -> State:
        return {"correct": jnp.zeros(num_classes, jnp.int32), "count": jnp.zeros(num_classes, jnp.int32)}

    def update(state: State, outputs: Mapping[str, Array], batch: Mapping[str, Array]) -> State:
        labels, valid = batch[label], _valid(batch)
        correct = valid & (label_rank(outputs[logits], labels) == 0)
        return {
            "correct": state["correct"].at[labels].add(correct.astype(jnp.int32)),
            "count": state["count"].at[labels].add(valid.astype(jnp.int32)),
        }

    def finish(state: State) -> dict[str, list[Any]]:
        pairs = zip(state["correct"].tolist(), state["count"].tolist(), strict=True)
        accuracy = [correct / count if count else None for correct, count in pairs]
        return {"accuracy": accuracy, "count": state["count"].tolist()}

    return Metric(init, update, add_states, finish)


def confusion_matrix(num_classes: int, logits: str = "logits", label: str = "label") -> Metric:
    """Number of examples by true class (row) and predicted class (column), as a list of rows."""

    def update(state: State, outputs: Mapping[str, Array], batch: Mapping[str, Array]) -> State:
        predicted = jnp.argmax(outputs[logits], axis=1)
        return state.at[batch[label], predicted].add(_valid(batch).astype(jnp.int32))

    def init() -> State:
        return jnp.zeros((num_classes, num_classes), jnp.int32)

    return Metric(init, update, add_states, lambda state: state.tolist())


def negative_log_likelihood(logits: str = "logits", label: str = "label") -> Metric:
    """Mean of `-log softmax(logits)[label]`, in nats."""

    def values(outputs: Mapping[str, Array], batch: Mapping[str, Array]) -> Float[Array, " B"]:
        log_probs = jax.nn.log_softmax(outputs[logits].astype(jnp.float32))
        return -jnp.take_along_axis(log_probs, batch[label][:, None], axis=1)[:, 0]

    return mean(values)


def psnr(peak: float, prediction: str, target: str) -> Metric:
    """Peak signal-to-noise ratio in decibels, `10 log10(peak^2 / MSE)` of each image, averaged over images.

    Args:
      peak: largest minus smallest value that an image can take (1 for images in [0, 1], 2 for images in [-1, 1]).
      prediction: name of the output, `[B, H, W, C]`.
      target: name of the batch field, `[B, H, W, C]`.
    """

    def values(outputs: Mapping[str, Array], batch: Mapping[str, Array]) -> Float[Array, " B"]:
        error = (outputs[prediction] - batch[target]).astype(jnp.float32)
        squared = jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))
        return 20 * jnp.log10(peak) - 10 * jnp.log10(squared)

    return mean(values)


def worst_mistakes(k: int, logits: str = "logits", label: str = "label") -> Metric:
    """The k wrong predictions with the highest confidence, most confident first.

    The result is a list of `{"index", "label", "predicted", "confidence"}`; `index` is the example's place in its
    data source, so that a report can show the images. Equal confidences are ordered by index, which makes the answer
    independent of batch size.
    """
    fields = ("doubt", "index", "label", "predicted")

    def init() -> State:
        # Doubt is 1 - confidence; 2 marks an empty place and sorts behind every mistake.
        return {name: jnp.full(k, 2.0) if name == "doubt" else jnp.full(k, -1, jnp.int32) for name in fields}

    def merge(left: State, right: State) -> State:
        columns = [jnp.concatenate([left[name], right[name]]) for name in fields]
        ordered = jax.lax.sort(columns, num_keys=2)
        return {name: column[:k] for name, column in zip(fields, ordered, strict=True)}

    def update(state: State, outputs: Mapping[str, Array], batch: Mapping[str, Array]) -> State:
        scores = jax.nn.softmax(outputs[logits].astype(jnp.float32))
        predicted = jnp.argmax(scores, axis=1)
        mistake = _valid(batch) & (predicted != batch[label])
        values = (1 - jnp.max(scores, axis=1), batch["index"], batch[label], predicted)
        masked = [jnp.where(mistake, value, -1).astype(jnp.int32) for value in values[1:]]
        return merge(state, dict(zip(fields, [jnp.where(mistake, values[0], 2.0), *masked], strict=True)))

    def finish(state: State) -> list[dict[str, Any]]:
        rows = zip(*(np.asarray(state[name]).tolist() for name in fields), strict=True)
        return [
            {"index": index, "label": true, "predicted": predicted, "confidence": 1 - doubt}
            for doubt, index, true, predicted in rows
            if doubt <= 1
        ]

    return Metric(init, update, merge, finish)
