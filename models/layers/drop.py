"""Noise in training: dropout, drop path, and keys for both."""

import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray


def fold_key(key: PRNGKeyArray | None, number: int) -> PRNGKeyArray | None:
    """An independent key for each use of randomness in a call; None stays None."""
    return None if key is None else jax.random.fold_in(key, number)


def dropout(x: Array, rate: float, *, train: bool, key: PRNGKeyArray | None) -> Array:
    """Each element is zero with probability `rate`, the rest scaled up, when training."""
    return _drop(x, rate, x.shape, "dropout", train, key)


def drop_path(x: Array, rate: float | Array, *, train: bool, key: PRNGKeyArray | None) -> Array:
    """Each example's residual branch is zero with probability `rate` when training (arXiv:1603.09382).

    The rate may be traced, as it is for scanned blocks.
    """
    return _drop(x, rate, (x.shape[0],) + (1,) * (x.ndim - 1), "drop path", train, key)


def _drop(x, rate, shape, name, train, key):
    if not train or (isinstance(rate, int | float | np.number) and rate == 0):
        return x
    if key is None:
        raise ValueError(f"{name} needs a key in training: call the model with key=...")
    keep = 1.0 - rate
    kept = jax.random.bernoulli(key, keep, shape)
    return x * (kept / keep).astype(x.dtype)
