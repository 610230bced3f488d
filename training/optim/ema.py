"""Exponential moving average of parameters and model state, as pure functions on pytrees."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree


def decay_at(decay: float, step: int | Int[Array, ""]) -> Float[Array, ""]:
    """Decay of the average at the 0-based `step`, with warm-up: `min(decay, (1 + step) / (10 + step))`.

    Without it the average of a run shorter than `1 / (1 - decay)` steps is mostly its initialisation. The formula is
    that of TensorFlow's `ExponentialMovingAverage(num_updates=...)`; timm's `ModelEmaV3` has another curve.
    """
    count = jnp.asarray(step, jnp.float32)
    return jnp.minimum(decay, (1.0 + count) / (10.0 + count))


def update_ema(ema: PyTree[Array], new: PyTree[Array], step: int | Int[Array, ""], decay: float) -> PyTree[Array]:
    """`d * ema + (1 - d) * new` with `d = decay_at(decay, step)` for floating leaves; integers are taken from `new`.

    The average keeps its own dtype, so a float32 average may follow values of lower precision.
    """
    rate = 1.0 - decay_at(decay, step)

    def moved(old: Array, value: Array) -> Array:
        if not jnp.issubdtype(old.dtype, jnp.floating):
            return value
        return old + (rate * (value.astype(old.dtype) - old)).astype(old.dtype)

    return jax.tree.map(moved, ema, new)
