"""How far a classifier's confidence can be trusted: expected calibration error, before and after temperature scaling.

Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599: confidence is the largest softmax
probability; the expected calibration error (ECE, eq. 3) is `sum_b n_b / n |accuracy_b - confidence_b|` over bins of
equal width, here `(b/15, (b+1)/15]`.

A temperature T divides the logits. Chosen on the examples it is judged on it looks better than it is, so it is
cross-fitted: the examples of even index choose the T with which the odd ones are judged, and the other way round. T
comes from a fixed grid, whose sufficient statistics (sum of the negative log-likelihood and the bins, for each T and
half) are sums; the result is therefore exact over any cut into batches, with no logits kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tasks.metrics import Metric, State, add_states, example_weights, label_rank

BINS = 15
# 61 values from 0.1 to 10, 8% apart; the middle one is exactly 1.
TEMPERATURES = np.logspace(-1, 1, 61)


def _bin_sums(
    confidence: Float[Array, " B"], correct: Float[Array, " B"], weights: Float[Array, " B"], bins: int
) -> Float[Array, "3 bins"]:
    """Rows: number of examples, sum of confidence, number of correct predictions; by bin of confidence."""
    place = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
    members = jax.nn.one_hot(place, bins) * weights[:, None]
    columns = jnp.stack([jnp.ones_like(confidence), confidence, correct])
    return jnp.matmul(columns, members, precision=jax.lax.Precision.HIGHEST)


def _valid_logits(logits: Float[Array, "B C"], weights: Float[Array, " B"]) -> Float[Array, "B C"]:
    """Zeros instead of what padding holds: a NaN there would survive the multiplication by a weight of zero."""
    return jnp.where(weights[:, None] > 0, logits.astype(jnp.float32), 0.0)


def _expected_error(sums: np.ndarray) -> float:
    """ECE from bin sums `[3, bins]`."""
    total = sums[0].sum()
    return float(np.abs(sums[2] - sums[1]).sum() / total) if total else float("nan")


def _curve(sums: np.ndarray) -> dict[str, list[float | None]]:
    """Mean confidence and accuracy by bin (None for an empty one) and the number of examples in it."""
    count, confidence, correct = sums.tolist()
    return {
        "confidence": [total / n if n else None for total, n in zip(confidence, count, strict=True)],
        "accuracy": [total / n if n else None for total, n in zip(correct, count, strict=True)],
        "count": count,
    }


def _binned(finish: Any, bins: int, logits: str, label: str) -> Metric:
    def update(state: State, outputs: Mapping[str, Array], batch: Mapping[str, Array]) -> State:
        weights = example_weights(batch)
        scores = _valid_logits(outputs[logits], weights)
        correct = (label_rank(scores, batch[label]) == 0).astype(jnp.float32)
        return state + _bin_sums(jnp.max(jax.nn.softmax(scores), axis=1), correct, weights, bins)

    return Metric(lambda: jnp.zeros((3, bins), jnp.float32), update, add_states, finish)


def expected_calibration_error(bins: int = BINS, logits: str = "logits", label: str = "label") -> Metric:
    """ECE of the model as it is (temperature 1), a fraction."""
    return _binned(_expected_error, bins, logits, label)


def reliability(bins: int = BINS, logits: str = "logits", label: str = "label") -> Metric:
    """The reliability diagram: `{"confidence", "accuracy", "count"}`, one entry for each bin of confidence."""
    return _binned(_curve, bins, logits, label)


def temperature_scaling(
    temperatures: np.ndarray = TEMPERATURES, bins: int = BINS, logits: str = "logits", label: str = "label"
) -> Metric:
    """NLL and ECE after cross-fitted temperature scaling (see the head of this file).

    The result holds `temperature` (the best for all examples), `temperature_even` and `temperature_odd` (chosen on
    the examples of even and odd index), `nll` and `ece` (each half judged with the temperature of the other) and
    their `reliability` curve. A half without examples chooses temperature 1.
    """
    grid = jnp.asarray(temperatures, jnp.float32)

    def init() -> State:
        return {"nll": jnp.zeros((len(grid), 2), jnp.float32), "bins": jnp.zeros((len(grid), 2, 3, bins), jnp.float32)}

    def update(state: State, outputs: Mapping[str, Array], batch: Mapping[str, Array]) -> State:
        weights, labels = example_weights(batch), batch[label]
        scores = _valid_logits(outputs[logits], weights)
        own = jnp.take_along_axis(scores, labels[:, None], axis=1)[:, 0]
        largest = jnp.max(scores, axis=1)
        correct = (label_rank(scores, labels) == 0).astype(jnp.float32)
        halves = jnp.stack([weights * (batch["index"] % 2 == half) for half in (0, 1)])

        def at(temperature: Float[Array, ""]) -> State:
            normalizer = jax.nn.logsumexp(scores / temperature, axis=1)
            nll = normalizer - own / temperature
            confidence = jnp.exp(largest / temperature - normalizer)
            by_half = jax.vmap(lambda half: _bin_sums(confidence, correct, half, bins))(halves)
            return {"nll": jnp.sum(halves * nll, axis=1), "bins": by_half}

        # One temperature at a time: all together would hold 61 copies of the logits.
        return add_states(state, jax.lax.map(at, grid))

    def finish(state: State) -> dict[str, Any]:
        nll, by_half = np.asarray(state["nll"], np.float64), np.asarray(state["bins"], np.float64)
        counts = by_half[0, :, 0].sum(axis=1)
        unscaled = int(np.argmin(np.abs(np.log(temperatures))))
        even, odd = (int(np.argmin(nll[:, half])) if counts[half] else unscaled for half in (0, 1))
        crossed = by_half[odd, 0] + by_half[even, 1]
        total = counts.sum()
        return {
            "temperature": float(temperatures[np.argmin(nll.sum(axis=1))]),
            "temperature_even": float(temperatures[even]),
            "temperature_odd": float(temperatures[odd]),
            "nll": float((nll[odd, 0] + nll[even, 1]) / total) if total else float("nan"),
            "ece": _expected_error(crossed),
            "reliability": _curve(crossed),
        }

    return Metric(init, update, add_states, finish)
