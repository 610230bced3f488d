"""Gates of channels from the mean of a map: squeeze and excite, and efficient channel attention."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.core import sharding
from models.core.init import Initializer, scheme
from models.layers.activation import ACTIVATIONS
from models.layers.conv import Conv
from models.layers.linear import DType, computed

_UNIFORM = scheme("timm").patch


class SqueezeExcite(nnx.Module):
    """`x * gate(fc2(activation(fc1(mean(x)))))` (arXiv:1709.01507).

    Args:
      hidden: channels between the two layers.
      activation, gate: names of `models.layers.activation.ACTIVATIONS`.
      kernel_init: of both layers, `[1, 1, in, out]` as those of a convolution.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: str,
        gate: str = "sigmoid",
        use_bias: bool = True,
        kernel_init: Initializer = _UNIFORM,
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        self.activation, self.gate, self.dtype = activation, gate, computed(dtype)
        shared = {"size": 1, "use_bias": use_bias, "kernel_init": kernel_init, "dtype": dtype, "rngs": rngs}
        self.fc1 = Conv(width, hidden, **shared)
        self.fc2 = Conv(hidden, width, **shared)

    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """In `dtype`; the mean is taken in float32."""
        mean = x.mean((1, 2), keepdims=True, dtype=jnp.float32)
        gate = self.fc2(ACTIVATIONS[self.activation](self.fc1(mean)))
        return x.astype(self.dtype) * ACTIVATIONS[self.gate](gate)


class EfficientChannelAttention(nnx.Module):
    """`x * gate(conv(mean(x)))`, a convolution of `size` along the channels (arXiv:1910.03151).

    Args:
      size: an odd number of neighbouring channels; `channel_kernel(width)` unless given.
      gate: a name of `models.layers.activation.ACTIVATIONS`.
    """

    def __init__(
        self,
        width: int,
        *,
        size: int | None = None,
        gate: str = "sigmoid",
        kernel_init: Initializer = _UNIFORM,
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        self.size, self.gate = channel_kernel(width) if size is None else size, gate
        self.dtype = computed(dtype)
        if self.size % 2 == 0:
            raise ValueError(f"size={size} of a convolution along channels: must be odd")
        self.kernel = sharding.parameter(kernel_init(rngs.params(), (self.size, 1, 1), jnp.float32))

    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """In `dtype`; channels outside count as zero."""
        mean = x.mean((1, 2), dtype=jnp.float32).astype(self.dtype)
        gate = jax.lax.conv_general_dilated(
            mean[..., None],
            sharding.gathered(self.kernel, self.dtype),
            (1,),
            ((self.size // 2, self.size // 2),),
            dimension_numbers=("NHC", "HIO", "NHC"),
        )
        return x.astype(self.dtype) * ACTIVATIONS[self.gate](gate[:, None, None, :, 0])


def channel_kernel(width: int, gamma: float = 2.0, beta: float = 1.0) -> int:
    """Size of the convolution for so many channels, odd and at least 3 (arXiv:1910.03151).

    >>> [channel_kernel(width) for width in (64, 256, 512)]
    [3, 5, 5]
    """
    size = int(abs(math.log2(width) + beta) / gamma)
    return max(size if size % 2 else size + 1, 3)


def rounded_channels(width: float, divisor: int = 8, round_limit: float = 0.9) -> int:
    """The multiple of `divisor` nearest to `width`, and the next one where that is less than `round_limit` of it.

    >>> [rounded_channels(width) for width in (4, 20, 63.36, 84.48)]
    [8, 24, 64, 88]
    """
    nearest = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < round_limit * width else nearest
