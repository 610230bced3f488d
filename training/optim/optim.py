"""Optimizers from a config: AdamW, LAMB, Lion, SGD, Muon and those of optax over flat dictionaries of parameters.

An optimizer is a list of rules. A rule is an optax transformation with the leaves, or layers of stacked leaves, that it
owns, and for each its learning-rate factor (per layer) and weight decay. No rule owns frozen parameters, and where a
task has several losses no rule owns parameters of two of them. A step is

    g      = gradient * min(1, clip_norm / norm(gradients of the group))
    d      = transformation(g) + weight_decay * parameter             (LAMB: times the trust ratio of each layer)
    update = -lr(step) * factor * d

An optimizer of optax gives the update itself (`training/optim/from_optax.py`).

docs/optim.md has the formulas, the recommended values and their sources.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from tasks.losses import Loss
from training.optim import from_optax, gradients, multipliers, muon, owners, pieces
from training.optim.patterns import Shaped, expand, nearest, select, stacked
from training.optim.pieces import Pieces
from training.optim.schedules import Schedule

Flat = dict[str, Array]
OptState = dict[str, Any]

MU_DTYPES = ("float32", "bfloat16")
MAIN = "main"

# Keys of our own optimizers; those of optax have options.
OWN_KEYS = ("b1", "b2", "eps", "momentum", "nesterov", "mu_dtype")

# Used where the config says None. docs/optim.md names the sources.
DEFAULTS: dict[str, dict[str, Any]] = {
    "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},
    "lamb": {"b1": 0.9, "b2": 0.999, "eps": 1e-6},
    "lion": {"b1": 0.9, "b2": 0.99},
    "sgd": {"momentum": 0.9, "nesterov": False},
    "muon": {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "momentum": 0.95, "nesterov": True},
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of the config group `optim` that decide an update, and that a group of parameters may override."""

    name: str
    learning_rate: float
    weight_decay: float
    weight_decay_on: str
    b1: float | None
    b2: float | None
    eps: float | None
    momentum: float | None
    nesterov: bool | None
    mu_dtype: str
    layer_decay: float
    clip_norm: float
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        for key, allowed in (
            ("name", (*DEFAULTS, *([self.name] if self.from_optax else []))),
            ("weight_decay_on", multipliers.DECAYED),
            ("mu_dtype", MU_DTYPES),
        ):
            if getattr(self, key) not in allowed:
                raise ValueError(nearest(f"config.optim.{key}", getattr(self, key), allowed))
        if self.from_optax:
            for key in OWN_KEYS:
                if getattr(self, key) not in (None, MU_DTYPES[0]):
                    raise ValueError(
                        f"config.optim.{key}: {self.name} takes config.optim.options, such as options.{key}"
                    )
            from_optax.check(self.name, self.options)
        elif self.options:
            raise ValueError(
                f"config.optim.options: {next(iter(self.options))!r} is given, and {self.name} takes none; they are "
                f"keyword arguments of {from_optax.PREFIX}NAME"
            )
        usual = DEFAULTS.get(self.name, {})
        for key in OWN_KEYS:
            takers = [name for name, values in DEFAULTS.items() if key in values]
            if usual and takers and self.name not in takers and getattr(self, key) is not None:
                raise ValueError(
                    f"config.optim.{key}={getattr(self, key)}: {self.name} has none; it is for {', '.join(takers)}"
                )
        for key, value in usual.items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)

    @property
    def from_optax(self) -> bool:
        """Whether the optimizer is one of optax."""
        return self.name.startswith(from_optax.PREFIX)


@dataclasses.dataclass(frozen=True)
class _Rule:
    """A transformation and what it owns; the three dictionaries have the same keys. A `complete` one has the learning
    rate in what it gives.
    """

    transformation: optax.GradientTransformation
    trust: bool
    complete: bool
    pieces: Pieces
    scale: dict[str, np.ndarray]
    decay: dict[str, float]

    def init(self, params: Mapping[str, Array]) -> OptState:
        return dict(self.transformation.init(pieces.take(params, self.pieces))._asdict())

    def update(
        self, grads: Flat, state: OptState, params: Mapping[str, Array], learning_rate: Float[Array, ""]
    ) -> tuple[Flat, OptState]:
        owned = pieces.take(params, self.pieces)
        before = jax.eval_shape(self.transformation.init, owned)
        directions, after = self.transformation.update(grads, type(before)(**state), owned)
        updates = {}
        for name, direction in directions.items():
            scale, decay = expand(self.scale[name], direction.ndim), self.decay[name]
            if self.complete:
                step = scale * (direction - learning_rate * decay * owned[name] if decay else direction)
            else:
                if decay:
                    direction = direction + decay * owned[name]
                if self.trust:
                    direction = _trust_ratio(name, direction, owned[name])
                step = -learning_rate * scale * direction
            updates[name] = step.astype(owned[name].dtype)
        return updates, dict(after._asdict())


@dataclasses.dataclass(frozen=True)
class _Group:
    """Rules whose gradients are clipped together; of several losses, those that one of them trains."""

    clip_norm: float
    rules: dict[str, _Rule]
    loss: str = ""

    def clip(self, grads: Flat, squared: Mapping[str, Array]) -> Flat:
        grads = {name: grads[name] for rule in self.rules.values() for name in rule.pieces}
        if not self.clip_norm:
            return grads
        norm = gradients.global_norm(squared[name] for name in grads)
        factor = jnp.minimum(1.0, self.clip_norm / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
        return {name: factor.astype(grad.dtype) * grad for name, grad in grads.items()}

    def update(
        self,
        grads: Flat,
        squared: Mapping[str, Array],
        states: Mapping[str, OptState],
        params: Mapping[str, Array],
        learning_rate: Float[Array, ""],
    ) -> tuple[Flat, dict[str, OptState]]:
        clipped = self.clip(grads, squared)
        steps: Flat = {}
        after = {}
        for label, rule in self.rules.items():
            own = {name: clipped[name] for name in rule.pieces}
            part, after[label] = rule.update(own, states[label], params, learning_rate)
            steps |= part
        return steps, after

    def leave(self, states: Mapping[str, OptState], params: Mapping[str, Array]) -> tuple[Flat, dict[str, OptState]]:
        """The update of a step in which nothing changes, by a bit: -0.0 is what can be added to 0.0 and -0.0."""
        owned = {piece: value for rule in self.rules.values() for piece, value in rule.pieces.items()}
        steps = {name: jnp.full_like(value, -0.0) for name, value in pieces.take(params, owned).items()}
        return steps, {label: states[label] for label in self.rules}


class Aux(NamedTuple):
    """What a step knows besides its result.

    Attributes:
        grad_norm: norm of all gradients that are not frozen, before clipping.
        learning_rate: of the schedule, before the factors of layers and groups.
        squared_norms: sum of squares of the gradient by name, [L] for stacked layers.
        bad_groups: which of `Optimizer.group_names` have a gradient that is not finite.
    """

    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    squared_norms: dict[str, Array]
    bad_groups: Bool[Array, "groups"]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Pure functions on flat dictionaries; made by `build`.

    Attributes:
        groups: rules by label (`main` is what no group of the task has claimed).
        group_names: names in reports, one for each unrolled block and each other module, frozen or not.
        trainable: names of the leaves that are not wholly frozen; the others need no gradient.
        schedule: learning rate by step.
        trained_by: of several losses, which leaves or layers each trains, `{loss: {leaf: bool [] or [L]}}`.
    """

    groups: dict[str, _Group]
    group_names: tuple[str, ...]
    trainable: tuple[str, ...]
    schedule: Schedule
    trained_by: Mapping[str, Mapping[str, np.ndarray]] = dataclasses.field(default_factory=dict)

    @property
    def rules(self) -> dict[str, _Rule]:
        """The rules of all groups by label."""
        return {label: rule for group in self.groups.values() for label, rule in group.rules.items()}

    def init(self, params: Mapping[str, Array]) -> OptState:
        """State before the first step.

        Returns:
            `{"count": int32 [], "rules": {label: {"mu": {name: array}, "count": int32 [], ...}}}`. The names are those
            of parameters or, if layers of a stacked leaf are frozen, of the rest of it (see `training.optim.pieces`).
        """
        return {
            "count": jnp.zeros([], jnp.int32),
            "rules": {label: rule.init(params) for label, rule in self.rules.items()},
        }

    def update(
        self,
        grads: Mapping[str, Array],
        opt_state: OptState,
        params: Mapping[str, Array],
        due: Mapping[str, bool | Bool[Array, ""]] | None = None,
    ) -> tuple[Flat, OptState, Aux]:
        """One step: updates for all of `params` (zero where frozen; to be added), the new state, and `Aux`.

        Args:
            grads: gradients by name; those not in `trainable` may be absent.
            opt_state: from `init` or the last `update`.
            params: all parameters.
            due: of several losses, which are taken in this step; the parameters of others and their state stay.
        """
        owned: Pieces = {}
        for rule in self.rules.values():
            owned |= rule.pieces
        held = pieces.take(grads, owned)
        squared = gradients.squared_norms(held)
        learning_rate = self.schedule(opt_state["count"])
        steps: Flat = {}
        states: dict[str, OptState] = {}
        for group in self.groups.values():
            before = {label: opt_state["rules"][label] for label in group.rules}
            taken = (due or {}).get(group.loss, True)
            if taken is True:
                part, after = group.update(held, squared, before, params, learning_rate)
            else:
                part, after = jax.lax.cond(
                    taken,
                    functools.partial(group.update, held, squared, before, params, learning_rate),
                    functools.partial(group.leave, before, params),
                )
            steps |= part
            states |= after
        updates = pieces.put({name: jnp.zeros_like(param) for name, param in params.items()}, steps, owned)
        aux = Aux(
            grad_norm=gradients.global_norm(squared.values()),
            learning_rate=learning_rate,
            squared_norms=squared,
            bad_groups=gradients.nonfinite_groups(squared, self.group_names),
        )
        return updates, {"count": optax.safe_increment(opt_state["count"]), "rules": states}, aux


def build(
    optim_cfg: Any,
    params: Mapping[str, Shaped],
    schedule: Schedule,
    layer_of: Callable[[str], int] | None = None,
    num_layers: int | None = None,
    groups: Mapping[str, tuple[str, Mapping[str, Any]]] | None = None,
    losses: Mapping[str, Loss] | None = None,
) -> Optimizer:
    """The optimizer of a config.

    Args:
        optim_cfg: object with the attributes of `Settings` and `freeze`, a tuple of patterns over unrolled names.
        params: leaves with shapes, by name.
        schedule: learning rate by step; `optim_cfg.learning_rate` is its peak.
        layer_of: number of an unrolled name for `layer_decay`, 0 to `num_layers`; None for one stack `blocks.i`.
        num_layers: the largest such number; given if and only if `layer_of` is.
        groups: optimizers of a task, `{label: (pattern, overrides of Settings)}`; the first match counts, and what no
            pattern matches is group "main". Each group clips by its own norm and scales the schedule to its own peak.
        losses: several losses of a task; a group that two of them train is one for each, clipped apart.

    Raises:
        ValueError: unknown names; a pattern that matches nothing; nothing left to train; a parameter that no loss or
            more than one trains.
    """
    main = Settings(**{field.name: getattr(optim_cfg, field.name) for field in dataclasses.fields(Settings)})
    free = {name: ~frozen for name, frozen in select("config.optim.freeze", optim_cfg.freeze, params).items()}
    trainable = tuple(name for name, mask in free.items() if mask.any())
    if not trainable:
        raise ValueError(f"config.optim.freeze: {tuple(optim_cfg.freeze)} leaves no parameter to train")
    losses = losses or {}
    trained_by = owners.of_losses(losses, params, free) if losses else {}
    claims = {}
    for label, (pattern, overrides) in (groups or {}).items():
        if label == MAIN:
            raise ValueError(f"optimizers: the label {MAIN!r} is taken by the parameters of no group")
        for key in overrides:
            if key not in Settings.__dataclass_fields__:
                raise ValueError(nearest(f"optimizers.{label}", key, Settings.__dataclass_fields__))
        matched = select(f"optimizers.{label}", (pattern,), params)
        claims[label] = (_replace(main, overrides), {name: mask & matched[name] for name, mask in free.items()})
        free = {name: mask & ~matched[name] for name, mask in free.items()}
    claims[MAIN] = (main, free)
    built = {}
    for label, (settings, owned) in claims.items():
        scales = multipliers.layer_scales(params, settings.layer_decay, layer_of, num_layers)
        if settings.learning_rate != main.learning_rate:
            if main.learning_rate == 0:
                raise ValueError(f"config.optim.learning_rate: 0, so the rate of optimizer {label!r} cannot follow it")
            scales = {name: scale * (settings.learning_rate / main.learning_rate) for name, scale in scales.items()}
        for loss, mine in trained_by.items():
            both = {name: mask & mine[name] for name, mask in owned.items()}
            own = f"{loss}-{label}"
            if rules := _rules(own, settings, pieces.cut(both), params, scales, _at_due(schedule, losses[loss])):
                built[own] = _Group(settings.clip_norm, rules, loss)
        if not trained_by and (rules := _rules(label, settings, pieces.cut(owned), params, scales, schedule)):
            built[label] = _Group(settings.clip_norm, rules)
    return Optimizer(built, tuple(gradients.param_groups(params)), trainable, schedule, trained_by)


def _at_due(schedule: Schedule, loss: Loss) -> Schedule:
    """The schedule by how often a loss was due, for an optimizer that counts its own steps."""
    return schedule if loss.every == 1 else lambda count: schedule(count * loss.every + loss.offset)


def _replace(main: Settings, overrides: Mapping[str, Any]) -> Settings:
    """Overrides on top of the main settings; another optimizer starts from its own published values."""
    if overrides.get("name", main.name) != main.name:
        overrides = dict.fromkeys(OWN_KEYS) | {"mu_dtype": main.mu_dtype, "options": {}} | dict(overrides)
    return dataclasses.replace(main, **overrides)


def _rules(
    label: str,
    settings: Settings,
    owned: Pieces,
    params: Mapping[str, Shaped],
    scales: Mapping[str, np.ndarray],
    schedule: Schedule,
) -> dict[str, _Rule]:
    """One rule, or for Muon a second one, AdamW, for all that is no matrix inside a block."""
    shapes = pieces.shapes(params, owned)
    decayed = multipliers.decayed(settings.weight_decay_on, shapes)
    decay = {piece: settings.weight_decay * decayed[piece] for piece in owned}
    if settings.from_optax and owned:
        found, complete, decays = from_optax.transformation(
            settings.name, settings.options, schedule, settings.learning_rate, decay, shapes
        )
        left = dict.fromkeys(owned, 0.0) if decays else decay
        return {label: _Rule(found, False, complete, owned, pieces.take(scales, owned), left)}
    parts = {label: (settings.name, list(owned))}
    if settings.name == "muon":
        matrices = [name for name in owned if muon.takes(name, shapes[name])]
        parts = {label: ("muon", matrices), f"{label}_adamw": ("adamw", [n for n in owned if n not in set(matrices)])}
    return {
        part: _Rule(
            transformation=_transformation(name, settings, {piece: shapes[piece] for piece in mine}),
            trust=name == "lamb",
            complete=False,
            pieces={piece: owned[piece] for piece in mine},
            scale=pieces.take(scales, {piece: owned[piece] for piece in mine}),
            decay={piece: decay[piece] for piece in mine},
        )
        for part, (name, mine) in parts.items()
        if mine
    }


def _transformation(name: str, settings: Settings, params: Mapping[str, Shaped]) -> optax.GradientTransformation:
    s: Any = settings
    if name in ("adamw", "lamb"):
        return optax.scale_by_adam(b1=s.b1, b2=s.b2, eps=s.eps, mu_dtype=s.mu_dtype)
    if name == "lion":
        return optax.scale_by_lion(b1=s.b1, b2=s.b2, mu_dtype=s.mu_dtype)
    if name == "muon":
        return muon.scale_by_muon(params, s.momentum, s.nesterov, s.mu_dtype)
    if s.momentum == 0:
        return optax.identity()
    return optax.trace(decay=s.momentum, nesterov=s.nesterov, accumulator_dtype=s.mu_dtype)


def _trust_ratio(name: str, update: Array, param: Array) -> Array:
    """`update * norm(param) / norm(update)` layer by layer, 1 where a norm is zero (arXiv:1904.00962, algorithm 2)."""

    def scaled(update: Array, param: Array) -> Array:
        return optax.scale_by_trust_ratio().update(update, optax.EmptyState(), param)[0]

    return (jax.vmap(scaled) if stacked(name) else scaled)(update, param)
