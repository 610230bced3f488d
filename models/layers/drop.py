"""Noise in training: dropout, drop path, and keys for both."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray


def fold_key(key: PRNGKeyArray | None, number: int) -> PRNGKeyArray | None:
    """An independent key for each use of randomness in a call; None stays None."""
    return None if key is None else jax.random.fold_in(key, number)


def checked_rate(name: str, rate: float | Array) -> float | Array:
    """The rate. ValueError outside [0, 1), where it is known: the traced one of a scanned layer is not."""
    if _is_known(rate) and not 0 <= rate < 1:
        raise ValueError(f"{name} rate {rate}; allowed: at least 0 and less than 1")
    return rate


def dropout(x: Array, rate: float | Array, *, train: bool, key: PRNGKeyArray | None) -> Array:
    """Each element is zero with probability `rate`, the rest scaled up, when training."""
    return _drop(x, rate, x.shape, "dropout", train, key)


def drop_path(x: Array, rate: float | Array, *, train: bool, key: PRNGKeyArray | None) -> Array:
    """Each example's residual branch is zero with probability `rate` when training (arXiv:1603.09382).

    The rate may be traced, as it is for scanned blocks.
    """
    return _drop(x, rate, (x.shape[0],) + (1,) * (x.ndim - 1), "drop path", train, key)


def _drop(x, rate, shape, name, train, key):
    rate = checked_rate(name, rate)
    if not train or (_is_known(rate) and rate == 0):
        return x
    if key is None:
        raise ValueError(f"{name} needs a key in training: call the model with key=...")
    keep = 1.0 - (rate if _is_known(rate) else rate.astype(jnp.float32))
    kept = jax.random.bernoulli(key, keep, shape)
    # In float32, rounded once: a factor rounded to bfloat16 would make all that is kept too small, or too large, by the
    # same share. An array of factors: of a scalar that it knows the compiler makes one with others, and an unrolled
    # layer would round otherwise than a scanned one.
    factor = jnp.where(kept, jnp.float32(1.0 / keep), 0.0)
    return (x * factor).astype(x.dtype)


def _is_known(rate: Any) -> bool:
    return isinstance(rate, int | float | np.number)
