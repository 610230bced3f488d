"""Everything of a run that changes from step to step, as one pytree."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

Flat = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run; `step` optimizer steps have been taken or left out.

    Attributes:
      step: `[]` int32.
      params: parameters by name, float32.
      model_state: other model variables by name, such as batch statistics.
      opt_state: optimizer state whose parameter-shaped parts are dictionaries with the same names.
      ema: moving averages `{"params": ..., "model_state": ...}`, or empty.
      key: the run's random key; step s uses `fold_in(key, s)`, so it never changes.
      health: steps that were not finite (`training/run/health.py`): how many, how many of them since the last good one,
        and of the first its number, its cause and in which of G groups of parameters.
      metrics: sums since the last log line.
    """

    step: jax.Array
    params: Flat
    model_state: Flat
    opt_state: Any
    ema: dict[str, Flat]
    key: jax.Array
    health: Flat
    metrics: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The fields by name: the form in which a checkpoint takes them."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
