"""Learning rate as a pure function of the step.

With peak learning rate `p`, final fraction `f`, `T` total, `W` warm-up and `C` cool-down steps, every schedule is

    lr(s)   = p * warm(s) * (f + (1 - f) * decay(s) * cool(s))
    warm(s) = min(1, s / W)                          1 when W = 0
    cool(s) = clip((T - s) / C, 0, 1)                1 when C = 0
    u(s)    = clip((s - W) / (T - W), 0, 1)
    decay(s): cosine (1 + cos(pi u)) / 2    linear 1 - u    constant 1    rsqrt (1 + max(s - W, 0) / timescale) ** -1/2

Step 0 is the first update, so a warm-up begins at zero and the last update (step T - 1) is just short of lr(T) = p * f.
With `f = 0` these are the schedules of big_vision (`utils.create_learning_rate_schedule`); rsqrt with cool-down is from
Zhai et al., "Scaling Vision Transformers" (arXiv:2106.04560, section 3.5).
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from training.optim.patterns import nearest

Schedule = Callable[[int | Int[Array, ""]], Float[Array, ""]]

RSQRT_TIMESCALE = 10_000  # steps; Zhai et al. keep it whatever the length of the run, so that runs can be prolonged


def _cosine(progress: Array, past_warmup: Array) -> Array:
    return 0.5 * (1.0 + jnp.cos(jnp.pi * progress))


def _linear(progress: Array, past_warmup: Array) -> Array:
    return 1.0 - progress


def _rsqrt(progress: Array, past_warmup: Array) -> Array:
    return 1.0 / jnp.sqrt(1.0 + past_warmup / RSQRT_TIMESCALE)


def _constant(progress: Array, past_warmup: Array) -> Array:
    return jnp.ones_like(progress)


DECAYS: dict[str, Callable[[Array, Array], Array]] = {
    "cosine": _cosine,
    "linear": _linear,
    "rsqrt": _rsqrt,
    "constant": _constant,
}


def learning_rate(optim_cfg: Any, total_steps: int, warmup_steps: int, cooldown_steps: int) -> Schedule:
    """The schedule of a config.

    Args:
        optim_cfg: object with `schedule` (a key of `DECAYS`), `learning_rate` (peak), `final_fraction` (of the peak).
        total_steps: updates in the whole run.
        warmup_steps: linear rise from zero, part of `total_steps`.
        cooldown_steps: linear fall at the end, part of `total_steps`, on top of the decay.

    Returns:
        A function of the 0-based step (Python or traced integer) giving a float32 scalar.

    Raises:
        ValueError: unknown schedule, final fraction outside [0, 1], or phases that do not fit in the run.
    """
    if optim_cfg.schedule not in DECAYS:
        raise ValueError(nearest("config.optim.schedule", optim_cfg.schedule, DECAYS))
    peak, final = float(optim_cfg.learning_rate), float(optim_cfg.final_fraction)
    if not 0.0 <= final <= 1.0:
        raise ValueError(f"config.optim.final_fraction: {final} is not between 0 and 1")
    if min(warmup_steps, cooldown_steps) < 0 or warmup_steps + cooldown_steps > total_steps:
        raise ValueError(
            f"config.optim.warmup ({warmup_steps} steps) and config.optim.cooldown ({cooldown_steps} steps) "
            f"must be at least 0 and fit in config.train.steps ({total_steps} steps)"
        )
    decay = DECAYS[optim_cfg.schedule]

    def schedule(step: int | Int[Array, ""]) -> Float[Array, ""]:
        position = jnp.asarray(step, jnp.float32)
        past_warmup = jnp.maximum(position - warmup_steps, 0.0)
        progress = jnp.minimum(past_warmup / max(total_steps - warmup_steps, 1), 1.0)
        shape = decay(progress, past_warmup)
        if cooldown_steps:
            shape *= jnp.clip((total_steps - position) / cooldown_steps, 0.0, 1.0)
        rate = peak * (final + (1.0 - final) * shape)
        if warmup_steps:
            rate *= jnp.minimum(1.0, position / warmup_steps)
        return rate

    return schedule
