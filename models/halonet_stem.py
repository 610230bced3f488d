"""Stems of HaloNets and of the ResNets they are made from: convolutions, then perhaps a pool."""

from collections.abc import Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from models.convolution import Conv
from models.halonet_block import HE, ConvNorm
from models.layers import DType
from models.mbconv import POOLS, pool_half
from models.names import unknown_name


class HaloStem(nnx.Module):
    """Convolutions with norm and activation, the first of stride 2, then a pool; a quarter of the sides.

    Without a pool the last one of several has stride 2, too; one convolution alone gives half of the sides.

    Args:
      widths: channels of the convolutions: (64,) with `size` 7 is ResNet's stem, (24, 32, 64) with 3 that of "tiered".
      size: of their kernels.
      pool: `"max"` or `"avg"` of 3 x 3 places, `"max2"` or `"avg2"` of 2 x 2, or None.
      plain: so many of the first convolutions have neither norm nor activation.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        *,
        size: int = 3,
        pool: str | None = "max",
        plain: int = 0,
        activation: str,
        dtype: DType,
        rngs: nnx.Rngs,
    ):
        if pool is not None and pool not in POOLS:
            raise ValueError(unknown_name("stem_pool", pool, POOLS))
        if not widths or not 0 <= plain <= len(widths):
            raise ValueError(f"stem={tuple(widths)} with stem_plain={plain}: at least one convolution is needed")
        self.pool = pool
        strides = [2] + [1] * (len(widths) - 1)
        if pool is None and len(widths) > 1:
            strides[-1] = 2
        self.stride = 4 if pool or len(widths) > 1 else 2
        shared: dict[str, Any] = {"size": size, "dtype": dtype, "rngs": rngs}
        convolutions: list[nnx.Module] = []
        for number, (width, stride) in enumerate(zip(widths, strides, strict=True)):
            if number < plain:
                convolutions.append(
                    Conv(channels, width, stride=stride, use_bias=False, kernel_init=HE, **shared)
                )
            else:
                convolutions.append(ConvNorm(channels, width, stride=stride, activation=activation, **shared))
            channels = width
        self.convs = nnx.List(convolutions)

    def __call__(self, images: Float[Array, "B Y X I"], *, train: bool = False) -> Float[Array, "B V U C"]:
        """Sides become `ceil(ceil(n / 2) / 2)`; `floor` for the pools of 2 x 2."""
        x = images
        for convolution in self.convs:
            x = convolution(x, train=train) if isinstance(convolution, ConvNorm) else convolution(x)
        return x if self.pool is None else pool_half(x, self.pool, "centred")
