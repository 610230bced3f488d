"""Convolution on maps `[B, Y, X, C]`. The parameter is float32; `dtype` is what is computed in."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.core import sharding
from models.core.init import Initializer
from models.layers.depthwise import LARGEST, depthwise, same_pads
from models.layers.linear import DType

PADDINGS = ("centred", "valid", "same")


class Conv(nnx.Module):
    """2-D convolution, kernel `[k, k, in / groups, out]`.

    Args:
      padding: zeros around the map. `"centred"`: `size // 2` on every side (PyTorch's `padding=k // 2`), so that an odd
        kernel of stride 2 gives `ceil(n / 2)` places, centred on every other one. `"same"`: TensorFlow's, and XLA's,
        which gives as many places but with an odd number of zeros has one more behind than before the map. `"valid"`:
        none. A number: as many on every side.
      groups: of channels that do not mix; `channels` for a depthwise convolution.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        size: int,
        stride: int = 1,
        padding: str | int = "centred",
        groups: int = 1,
        use_bias: bool = True,
        kernel_init: Initializer,
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        if not isinstance(padding, int) and padding not in PADDINGS:
            raise ValueError(f"padding={padding!r} of a convolution; allowed: a number, {', '.join(PADDINGS)}")
        self.stride, self.groups, self.dtype = stride, groups, dtype
        around = {"centred": size // 2, "valid": 0}.get(padding, padding) if isinstance(padding, str) else padding
        self.padding: Any = "SAME" if around == "same" else ((around, around),) * 2
        self.kernel = sharding.parameter(
            kernel_init(rngs.params(), (size, size, channels // groups, width), jnp.float32)
        )
        self.bias = sharding.parameter(jnp.zeros((width,), jnp.float32)) if use_bias else None

    def __call__(self, x: Float[Array, "B Y X I"]) -> Float[Array, "B V U O"]:
        """In `dtype`, or that of x."""
        dtype = self.dtype or x.dtype
        x, kernel = x.astype(dtype), sharding.gathered(self.kernel, dtype)
        size, channels = kernel.shape[0], x.shape[-1]
        if self.groups == channels == kernel.shape[-1] and size <= LARGEST:
            same = same_pads(x.shape[1:3], size, self.stride)
            y = depthwise(x, kernel, self.stride, same if self.padding == "SAME" else self.padding)
        else:
            y = jax.lax.conv_general_dilated(
                x,
                kernel,
                (self.stride, self.stride),
                self.padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=self.groups,
            )
        return sharding.over_batch(y if self.bias is None else y + self.bias[...].astype(dtype))
