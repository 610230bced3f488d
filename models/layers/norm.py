"""Normalization over channels, or over everything else; statistics in float32."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
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


class BatchNorm(nnx.Module):
    """Batch normalization over all axes but the last (arXiv:1502.03167); statistics in float32.

    In training the statistics are those of the batch, and running ones move towards them; in evaluation the running
    ones are used. Under a mesh the batch is the global one: the means are written over the whole axis, and the compiler
    adds the sums of the devices.

    Args:
      momentum: share of the old running statistics that is kept (PyTorch's is one minus this).
    """

    def __init__(self, width: int, *, eps: float = 1e-5, momentum: float = 0.9, dtype: DType = None):
        self.eps, self.momentum, self.dtype = eps, momentum, computed(dtype)
        self.scale = nnx.Param(full((width,), 1))
        self.bias = nnx.Param(full((width,), 0))
        self.mean = nnx.BatchStat(full((width,), 0))
        self.var = nnx.BatchStat(full((width,), 1))

    def __call__(self, x: Float[Array, "... C"], *, train: bool = False) -> Float[Array, "... C"]:
        """In float32, returned in `dtype`. With `train` it also updates the running statistics."""
        check_channels("norm", x, self.scale.shape[0])
        wide = x.astype(jnp.float32)
        mean, variance = self.mean[...], self.var[...]
        if train:
            axes = tuple(range(x.ndim - 1))
            mean = wide.mean(axes)
            variance = jnp.square(wide - mean).mean(axes)
            self._move(mean, variance, x.size // x.shape[-1])
        factor = jax.lax.rsqrt(variance + self.eps) * self.scale[...]
        if train:
            y = (wide - mean) * factor + self.bias[...]
        else:
            # One product and one sum, as in PyTorch: its rounding decides alike which units of a ReLU behind are off.
            y = wide * factor + (self.bias[...] - mean * factor)
        return y.astype(self.dtype)

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
