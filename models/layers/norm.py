"""Normalization over channels, or over everything else; statistics in float32."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from models.core.draw import full
from models.layers.checks import check_channels
from models.layers.linear import DType, computed


class LayerNorm(nnx.Module):
    """Layer normalization over the last axis (arXiv:1607.06450); statistics in float32."""

    def __init__(self, width: int, *, eps: float = 1e-6, scale: float = 1.0, dtype: DType = None):
        self.eps, self.dtype = eps, computed(dtype)
        self.scale = nnx.Param(full((width,), scale))
        self.bias = nnx.Param(full((width,), 0))

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        """In float32, returned in `dtype`."""
        check_channels("norm", x, self.scale.shape[0])
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.eps) * self.scale[...] + self.bias[...]
        return y.astype(self.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalization over the last axis (arXiv:1910.07467); statistics in float32."""

    def __init__(self, width: int, *, eps: float = 1e-6, dtype: DType = None):
        self.eps, self.dtype = eps, computed(dtype)
        self.scale = nnx.Param(full((width,), 1))

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        """In float32, returned in `dtype`."""
        check_channels("norm", x, self.scale.shape[0])
        wide = x.astype(jnp.float32)
        y = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps) * self.scale[...]
        return y.astype(self.dtype)


class Frozen(nnx.Variable):
    """Which layers of a scanned stack are frozen, `[L]` bool: given to a model for a call, never saved with it."""


class BatchNorm(nnx.Module):
    """Batch normalization over all axes but the last (arXiv:1502.03167); statistics in float32.

    In training the statistics are those of the batch, and running ones move towards them; in evaluation the running
    ones are used. Under a mesh the batch is the global one: the means are written over the whole axis, and the compiler
    adds the sums of the devices.

    Args:
      momentum: share of the old running statistics that is kept (PyTorch's is one minus this).

    Attributes:
      frozen: True where training uses the running statistics too, and leaves them as they are (torchvision's
        `FrozenBatchNorm2d`); of layers in a scanned stack that differ, a `Frozen` with a boolean each. Set by
        `models.freeze_statistics`.
    """

    frozen: bool | Frozen = False  # of the class: NNX lets a first assignment choose between a value and a variable

    def __init__(self, width: int, *, eps: float = 1e-5, momentum: float = 0.9, dtype: DType = None):
        self.eps, self.momentum, self.dtype = eps, momentum, computed(dtype)
        self.scale = nnx.Param(full((width,), 1))
        self.bias = nnx.Param(full((width,), 0))
        self.mean = nnx.BatchStat(full((width,), 0))
        self.var = nnx.BatchStat(full((width,), 1))

    def __call__(self, x: Float[Array, "... C"], *, train: bool = False) -> Float[Array, "... C"]:
        """In float32, returned in `dtype`. With `train` it also updates the running statistics, unless frozen."""
        check_channels("norm", x, self.scale.shape[0])
        wide = x.astype(jnp.float32)
        if not train or self.frozen is True:
            y = self._by_running(wide)
        elif isinstance(self.frozen, Frozen):
            # The statistics as they were: the batch moves them, in those of these layers that are not frozen.
            frozen, before, y = self.frozen[...], (self.mean[...], self.var[...]), self._by_running(wide)
            y = jnp.where(frozen, y, self._by_batch(wide))
            for running, old in zip((self.mean, self.var), before, strict=True):
                running[...] = jnp.where(frozen, old, running[...])
        else:
            y = self._by_batch(wide)
        return y.astype(self.dtype)

    def _by_running(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        factor = jax.lax.rsqrt(self.var[...] + self.eps) * self.scale[...]
        # One product and one sum, as in PyTorch: its rounding decides alike which units of a ReLU behind are off.
        return x * factor + (self.bias[...] - self.mean[...] * factor)

    def _by_batch(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        axes = tuple(range(x.ndim - 1))
        mean = x.mean(axes)
        variance = jnp.square(x - mean).mean(axes)
        self._move(mean, variance, x.size // x.shape[-1])
        factor = jax.lax.rsqrt(variance + self.eps) * self.scale[...]
        return (x - mean) * factor + self.bias[...]

    def _move(self, mean: Float[Array, " C"], variance: Float[Array, " C"], count: int) -> None:
        # The running variance is the unbiased one, as in PyTorch and the official code of every family here.
        unbiased = variance * (count / max(count - 1, 1))
        for running, new in ((self.mean, mean), (self.var, unbiased)):
            moved = self.momentum * running[...] + (1 - self.momentum) * new
            running[...] = jax.lax.stop_gradient(moved)


NORMS: dict[str, Callable[..., nnx.Module]] = {"batch": BatchNorm, "layer": LayerNorm}
"""Name -> norm of a map, made as `norm(width, *, eps, dtype)`."""


def normed(norm: nnx.Module, x: Float[Array, "... C"], *, train: bool) -> Float[Array, "... C"]:
    """A norm of `NORMS` on a map or on tokens."""
    return norm(x, train=train) if isinstance(norm, BatchNorm) else norm(x)  # type: ignore[operator]


def freeze_statistics(model: nnx.Module, frozen: Callable[[str, Any], np.ndarray]) -> None:
    """Makes the batch normalizations of a model whose parameters are frozen use their running statistics in training.

    In place. Where layers of a scanned stack differ, a variable `Frozen` is added to the model's state, so that a split
    model has an entry more.

    Args:
      frozen: which layers of a leaf are, from its name and shape: bool [] or, of a scanned one, [L].

    Raises:
      ValueError: a frozen module keeps batch statistics and has no attribute `frozen` (flax's own normalization).
    """
    for path, module in nnx.iter_modules(model):
        leaves = {name: value for name, value in vars(module).items() if isinstance(value, nnx.Variable)}
        if not any(isinstance(value, nnx.BatchStat) for value in leaves.values()):
            continue
        chosen = [name for name, value in leaves.items() if isinstance(value, nnx.Param)] or list(leaves)
        names = {".".join(map(str, (*path, name))): leaves[name].get_value() for name in chosen}
        mask = np.all([frozen(name, value) for name, value in names.items()], axis=0)
        if not mask.any():
            continue
        if not hasattr(module, "frozen"):
            kind = f"{type(module).__module__}.{type(module).__name__}"
            raise ValueError(
                f"the batch statistics of {'.'.join(map(str, path))} ({kind}) cannot be frozen with its "
                "parameters: use models.layers.norm.BatchNorm, or leave its parameters free"
            )
        module.frozen = True if mask.all() else Frozen(mask)
