"""A convolution with batch norm and activation, the piece that ResNets are made of."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from models.core.init import he_normal_fan_out, normal
from models.layers.activation import ACTIVATIONS
from models.layers.conv import Conv
from models.layers.linear import DType, Linear
from models.layers.norm import BatchNorm

HE = he_normal_fan_out()
"""Initializer of convolutions that do not have groups (arXiv:1502.01852)."""


class ConvNorm(nnx.Module):
    """Convolution without bias, batch norm, activation (none for None). Without a size it is a linear layer."""

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        size: int | None = None,
        stride: int = 1,
        group_width: int = 0,
        activation: str | None,
        dtype: DType,
        rngs: nnx.Rngs,
    ):
        if size is not None and size % 2 == 0:
            raise ValueError(f"size={size} of a convolution; allowed: odd numbers")
        if group_width and channels % group_width:
            raise ValueError(f"group_width={group_width} does not divide {channels} channels")
        self.activation, self.skip = activation, stride if size is None else 1
        shared: dict[str, Any] = {"use_bias": False, "dtype": dtype, "rngs": rngs}
        if size is None:
            # On CPUs the gradients of a matrix product take less than half the time of a convolution's.
            self.conv: nnx.Module = Linear(channels, width, kernel_init=HE, **shared)
        else:
            groups = channels // group_width if group_width else 1
            kernel_init = normal((2 * groups / (size * size * width)) ** 0.5)
            shared |= {"size": size, "stride": stride, "groups": groups, "kernel_init": kernel_init}
            self.conv = Conv(channels, width, **shared)
        self.norm = BatchNorm(width, dtype=dtype)

    def __call__(self, x: Float[Array, "B Y X I"], *, train: bool) -> Float[Array, "B V U O"]:
        """Sides become `ceil(n / stride)`."""
        x = x if self.skip == 1 else x[:, :: self.skip, :: self.skip]
        y = self.norm(self.conv(x), train=train)
        return y if self.activation is None else ACTIVATIONS[self.activation](y)
