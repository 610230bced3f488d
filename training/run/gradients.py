"""Loss and gradient of a batch: of a task's one loss, or of several through one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tasks.base import Task
from tasks.losses import Loss, named
from training.optim.patterns import expand
from training.run.state import Flat

Owned = Mapping[str, Mapping[str, np.ndarray]]
Due = Mapping[str, Any]


def of_one(task: Task, forward: Callable[..., tuple[Any, Flat]]) -> Callable[..., Any]:
    """What `of_several` gives, for a task whose one loss trains all parameters and is always due."""

    def loss_of(params: Flat, model_state: Flat, batch: Any, key: jax.Array, partners: Any):
        outputs, after = forward(params, model_state, batch, key, partners)
        loss, scalars = task.loss(outputs, batch)
        return loss, (after, scalars, outputs)

    def gradient_of(params: Flat, model_state: Flat, batch: Any, key: jax.Array, partners: Any, due: Due):
        del due
        return jax.value_and_grad(loss_of, has_aux=True)(params, model_state, batch, key, partners)

    return gradient_of


def of_several(losses: Mapping[str, Loss], owned: Owned, forward: Callable[..., tuple[Any, Flat]]):
    """`gradient_of(params, model_state, batch, key, partners, due)`, which returns
    `(loss, (model_state, scalars, outputs)), gradients`.

    `loss` is the sum of all; each of the `gradients` is that of the loss that trains the parameter, and zero if this
    one is not due: it is not computed then.

    Args:
      owned: `{loss: {leaf: bool [] or [L]}}`, what each loss trains.
      forward: `(params, model_state, batch, key, partners) -> (outputs, model state after it)`.
    """

    def gradient_of(params: Flat, model_state: Flat, batch: Any, key: jax.Array, partners: Any, due: Due):
        outputs, back, after = jax.vjp(
            lambda params: forward(params, model_state, batch, key, partners), params, has_aux=True
        )
        values, scalars = [], dict[str, Any]()
        grads = {name: jnp.zeros_like(value) for name, value in params.items()}
        for name, loss in losses.items():
            value, to_outputs, parts = jax.vjp(
                lambda found, loss=loss: loss.function(found, batch), outputs, has_aux=True
            )
            scalars |= named(name, value, parts)
            values.append(value)
            mine = {leaf: mask for leaf, mask in owned[name].items() if mask.any()}

            def gradient(value=value, to_outputs=to_outputs, mine=mine) -> Flat:
                found = back(to_outputs(jnp.ones_like(value))[0])[0]
                return {leaf: found[leaf] for leaf in mine}

            def nothing(mine=mine) -> Flat:
                return {leaf: jnp.zeros_like(params[leaf]) for leaf in mine}

            found = gradient() if due[name] is True else jax.lax.cond(due[name], gradient, nothing)
            for leaf, mask in mine.items():
                layers = expand(mask, found[leaf].ndim)
                grads[leaf] = found[leaf] if mask.all() else jnp.where(layers, found[leaf], grads[leaf])
        return (sum(values[1:], start=values[0]), (after, scalars, outputs)), grads

    return gradient_of
