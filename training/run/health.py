"""Steps that were not finite: counted on the devices in every step, judged on the host where it reads results anyway.

A step is bad if its loss, a gradient, or something that it would have left behind (parameters, optimizer state, batch
statistics) is not finite: an update can overflow although loss and gradients are finite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool

from training.run.state import Flat

# What was not finite first, in the order in which a step computes them.
LOSS, GRADIENT, UPDATE = range(3)


def healthy(groups: int) -> Flat:
    """The record of a run in which every step was finite so far; `groups` of parameters."""
    return {
        "bad_steps": jnp.zeros((), jnp.int32),
        "bad_in_a_row": jnp.zeros((), jnp.int32),
        "first_bad_step": jnp.full((), -1, jnp.int32),
        "first_cause": jnp.zeros((), jnp.int32),
        "bad_groups": jnp.zeros((groups,), bool),
    }


def noted(
    health: Flat,
    step: Array,
    *,
    loss: Bool[Array, ""],
    gradients: Bool[Array, " groups"],
    update: Bool[Array, ""],
    params: Bool[Array, " groups"],
) -> Flat:
    """The record after a step.

    Args:
      health: the record before it.
      step: its 0-based number.
      loss, update: whether the loss, or anything that the update leaves behind, is not finite.
      gradients, params: in which groups gradients, or new parameters, are not finite.
    """
    bad = loss | gradients.any() | update
    first = bad & (health["first_bad_step"] < 0)
    cause = jnp.where(gradients.any(), GRADIENT, jnp.where(loss, LOSS, UPDATE))
    groups = jnp.where(loss | gradients.any(), gradients, params)
    return {
        "bad_steps": health["bad_steps"] + bad,
        "bad_in_a_row": jnp.where(bad, health["bad_in_a_row"] + 1, 0),
        "first_bad_step": jnp.where(first, step, health["first_bad_step"]),
        "first_cause": jnp.where(first, cause, health["first_cause"]),
        "bad_groups": jnp.where(first, groups, health["bad_groups"]),
    }


def check(
    health: Mapping[str, Any],
    group_names: Sequence[str],
    *,
    step: int,
    total_steps: int,
    skip: bool,
    most_skipped: int,
    saved: int | None,
) -> None:
    """Judges a record that the host has read.

    Args:
      step: how many steps have been taken or skipped.
      skip: whether bad steps are left out (`config.train.nonfinite`).
      most_skipped: how many in a row end the run all the same; half of the run does so where that is fewer.
      saved: the newest checkpoint.

    Raises:
      FloatingPointError: the run cannot go on; in one line, which step was the first, and what was not finite in it.
    """
    row, first = int(health["bad_in_a_row"]), int(health["first_bad_step"]) + 1
    most = min(most_skipped, (total_steps + 1) // 2)
    if not health["bad_steps"] or (skip and row < most):
        return
    if skip:
        bound = f"train.most_skipped={most_skipped}" if most == most_skipped else f"{most} are half of the run"
        head = (
            f"{row} steps in a row, all since step {step - row + 1}, were skipped because they are not finite "
            f"({bound}). In step {first}, the first of {int(health['bad_steps'])}, "
            f"{_what(health, group_names)}. The parameters are those after step {step - row}"
        )
        advice = "Lower optim.learning_rate or set optim.clip_norm"
    else:
        head = f"step {first}: {_what(health, group_names)}. Nothing was saved since"
        advice = "Lower optim.learning_rate, set optim.clip_norm, or train.nonfinite=skip"
    newest = "there is no checkpoint" if saved is None else f"the last checkpoint is step {saved}"
    raise FloatingPointError(f"{head}; {newest}. {advice}")


def _what(health: Mapping[str, Any], group_names: Sequence[str]) -> str:
    names = [name for name, bad in zip(group_names, health["bad_groups"], strict=True) if bad]
    where = f"{', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
    match int(health["first_cause"]):
        case value if value == GRADIENT:
            return f"loss or gradient is not finite; gradients not finite in {where}"
        case value if value == LOSS:
            return "the loss is not finite; the gradients are finite"
    if names:
        return f"the update overflows (loss and gradients are finite): new parameters not finite in {where}"
    return "loss and gradients are finite, but the optimizer state or batch statistics after it are not"
