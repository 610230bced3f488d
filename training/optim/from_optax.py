"""Any optimizer of optax, `optax:NAME`, over flat dictionaries of leaves that may be stacked.

optax is shown unrolled names, one leaf for each layer: what takes norms of a leaf, factors it, or compares leaves then
does the same for a stack as for its unrolled twin, at the price of operations for each layer. The learning rate is
handed over as the schedule, so each optimizer uses it as it was published.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from training.optim.patterns import Shaped, nearest, stacked, unrolled
from training.optim.schedules import Schedule

PREFIX = "optax:"

_LOSS = "it needs the value of the loss besides the gradient, which this loop does not give"
_AVERAGE = "it trains other parameters than are meant to be evaluated, which this loop does not know of"
_REFUSED = {
    "dpsgd": "it needs the gradients of single examples, which this loop does not give",
    "lbfgs": _LOSS,
    "momo": _LOSS,
    "momo_adam": _LOSS,
    "optimistic_adam": "it needs a constant learning rate (optax:optimistic_adam_v2 takes a schedule)",
    "polyak_sgd": _LOSS,
    "schedule_free": _AVERAGE,
    "schedule_free_adamw": _AVERAGE,
    "schedule_free_sgd": _AVERAGE,
    "sophia": "it needs the diagonal of the Hessian, which this loop does not give",
}
_MASKS = ("mask", "weight_decay_mask")
# Those that take a number for the learning rate: they get its peak, and their updates follow the schedule.
_CONSTANT = ("rprop", "sm3")
# Arguments that come from elsewhere.
_GIVEN = {"learning_rate": "learning_rate", "weight_decay": "weight_decay", **dict.fromkeys(_MASKS, "weight_decay_on")}


class State(NamedTuple):
    """optax's own state, whose parameter-shaped parts have unrolled names."""

    optax: Any


@functools.cache
def _optimizers() -> dict[str, Callable[..., optax.GradientTransformation]]:
    """What optax and optax.contrib have that takes a learning rate and is no part of an optimizer."""
    found = {}
    for module in (optax.contrib, optax):  # the latter last: its names count
        for name, function in inspect.getmembers(module, inspect.isfunction):
            public = not name.startswith(("_", "scale_by_"))
            if public and name not in _REFUSED and "learning_rate" in inspect.signature(function).parameters:
                found[name] = function
    return dict(sorted(found.items()))


def check(name: str, options: Mapping[str, Any]) -> None:
    """Refuses what cannot work whatever the parameters are.

    Args:
        name: `optax:NAME`.
        options: keyword arguments of `config.optim.options`.

    Raises:
        ValueError: optax has no such optimizer, it does not fit this loop, or it takes no such option; in one line.
    """
    short = name.removeprefix(PREFIX)
    if short in _REFUSED:
        raise ValueError(f"config.optim.name={name}: {_REFUSED[short]}")
    if short not in _optimizers():
        raise ValueError(nearest("config.optim.name=optax:NAME", short, _optimizers()))
    taken = inspect.signature(_optimizers()[short]).parameters
    for option in options:
        if option in _GIVEN and option in taken:
            raise ValueError(f"config.optim.options.{option}: comes from config.optim.{_GIVEN[option]}")
        if option not in taken:
            raise ValueError(nearest(f"config.optim.options of {name}", option, [k for k in taken if k not in _GIVEN]))


def transformation(
    name: str,
    options: Mapping[str, Any],
    schedule: Schedule,
    peak: float,
    weight_decay: Mapping[str, float],
    params: Mapping[str, Shaped],
) -> tuple[optax.GradientTransformation, bool, bool]:
    """The optimizer, over stacked leaves; whether its updates are complete; whether they have the weight decay in them.

    Complete updates are to be added to the parameters; others are directions, to be multiplied by `-schedule(step)`.

    Args:
        name, options: as in `check`.
        schedule: learning rate by step; `peak` is its largest value.
        weight_decay: of each leaf, 0 or one value.
        params: the leaves to update.

    Raises:
        ValueError: optax refuses the options, or cannot update these parameters; in one line.
    """
    short = name.removeprefix(PREFIX)
    taken = inspect.signature(_optimizers()[short]).parameters
    complete = short not in _CONSTANT
    peak = peak or 1.0  # whose updates are multiplied by a rate of 0
    keywords: dict[str, Any] = {"learning_rate": schedule if complete else peak, **options}
    # One weight decay with a mask is the optimizer's own to apply: LAMB's, for one, is part of its trust ratio.
    amounts = [key for key in taken if key.endswith("weight_decay") and key not in options]
    decays = amounts == ["weight_decay"] and bool(set(_MASKS) & set(taken))
    if decays:
        layers = {one: weight_decay[leaf] > 0 for leaf in params for one in unrolled(leaf, params[leaf])}
        keywords["weight_decay"] = max(weight_decay.values(), default=0.0)
        keywords[next(key for key in _MASKS if key in taken)] = layers
    else:
        keywords |= dict.fromkeys(amounts, 0.0)
    try:
        wrapped = _over_stacks(_optimizers()[short](**keywords), 1.0 if complete else -1.0 / peak)
        shapes = {leaf: jax.ShapeDtypeStruct(value.shape, jnp.float32) for leaf, value in params.items()}
        jax.eval_shape(wrapped.update, shapes, jax.eval_shape(wrapped.init, shapes), shapes)
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        given = f" with options {dict(options)}" if options else ""
        raise ValueError(f"config.optim.name={name}{given}: optax says: {type(error).__name__}: {first}") from error
    return wrapped, complete, decays


def _over_stacks(inner: optax.GradientTransformation, factor: float) -> optax.GradientTransformation:
    def layers(flat: Mapping[str, Array]) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for name, leaf in flat.items():
            found |= zip(unrolled(name, leaf), leaf, strict=True) if stacked(name) else {name: leaf}
        return found

    def leaves(found: Mapping[str, Array], like: Mapping[str, Array]) -> dict[str, Array]:
        return {
            name: jnp.stack([found[one] for one in unrolled(name, leaf)]) if stacked(name) else found[name]
            for name, leaf in like.items()
        }

    def init(params: Any) -> State:
        # Copies: an optimizer may keep the parameters it began with, and a donated buffer may not appear twice.
        return State(jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), inner.init(layers(params))))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[dict[str, Array], State]:
        found, after = inner.update(layers(updates), state.optax, layers(params))
        scaled = found if factor == 1.0 else {name: factor * step for name, step in dict(found).items()}
        return leaves(scaled, updates), State(after)

    return optax.GradientTransformation(init, update)
