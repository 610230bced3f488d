"""Convolution on maps `[B, Y, X, C]`. The parameter is float32; `dtype` is what is computed in."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models import partition
from models.init import Initializer
from models.layers import DType


class Conv(nnx.Module):
    """2-D convolution with an odd kernel `[k, k, in, out]`, the map padded by `k // 2` zeros on every side.

    So a stride of 2 gives `ceil(n / 2)` places, centred on every other one (PyTorch's `padding=k // 2`; XLA's "SAME"
    would centre them half a place further).
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        size: int,
        stride: int = 1,
        use_bias: bool = True,
        kernel_init: Initializer,
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        self.stride, self.padding, self.dtype = stride, size // 2, dtype
        self.kernel = partition.parameter(kernel_init(rngs.params(), (size, size, channels, width), jnp.float32))
        self.bias = partition.parameter(jnp.zeros((width,), jnp.float32)) if use_bias else None

    def __call__(self, x: Float[Array, "B Y X I"]) -> Float[Array, "B V U O"]:
        """In `dtype`, or that of x."""
        dtype = self.dtype or x.dtype
        y = jax.lax.conv_general_dilated(
            x.astype(dtype),
            partition.gathered(self.kernel, dtype),
            (self.stride, self.stride),
            [(self.padding, self.padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return partition.over_batch(y if self.bias is None else y + self.bias[...].astype(dtype))
