"""Layers of DaViT (arXiv:2204.03645): blocks with convolutions for positions, the stem, and what is between stages."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from attn import Grid, Hook
from models import layers, partition
from models.blocks import BlockOptions
from models.convolution import Conv
from models.init import scheme
from models.layers import DType, LayerNorm
from models.mlp import ACTIVATIONS
from models.padding import to_multiple


class ConvPosition(nnx.Module):
    """`x + activation(conv(x))` with a depthwise 3 x 3 convolution, which tells positions by its padding (CPVT,
    arXiv:2102.10882); no activation as published.
    """

    def __init__(self, width: int, *, activation: str | None, init: str, dtype: DType, rngs: nnx.Rngs):
        self.activation = activation
        kernel_init = scheme(init).patch
        self.proj = Conv(width, width, size=3, groups=width, kernel_init=kernel_init, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B N C"], grid: Grid) -> Float[Array, "B N C"]:
        """On a grid without prefix tokens."""
        y = self.proj(x.reshape(x.shape[0], *grid.shape, -1)).reshape(x.shape)
        return x + (y if self.activation is None else ACTIVATIONS[self.activation](y))


class PositionedBlock(nnx.Module):
    """`x = cpe1(x)`, `x += attn(norm1(x))`, `x = cpe2(x)`, `x += mlp(norm2(x))` (figure 3): a block like others.

    Args:
      feed_forward: without it nothing follows `cpe2`.
      positions: without it there is neither convolution (the options `conv_at_attn` and `conv_at_ffn` of Florence-2's
        code), and what tells places apart is the stem and what is between stages.
      position_activation: of both convolutions.
    """

    def __init__(
        self,
        options: BlockOptions,
        rngs: nnx.Rngs,
        *,
        feed_forward: bool = True,
        positions: bool = True,
        position_activation: str | None = None,
    ):
        self.dropout = options.dropout
        position = {"activation": position_activation, "init": options.init, "dtype": options.dtype, "rngs": rngs}
        self.cpe1 = ConvPosition(options.width, **position) if positions else None
        self.norm1, self.attn = options.make_norm(), options.make_attention(rngs)
        self.cpe2 = ConvPosition(options.width, **position) if positions else None
        self.norm2 = options.make_norm() if feed_forward else None
        self.mlp = options.make_mlp(rngs) if feed_forward else None

    def __call__(
        self,
        x: Float[Array, "B N C"],
        grid: Grid,
        *,
        drop_path: float | Array = 0.0,
        context: Array | None = None,
        mask: Array | None = None,
        hook: Hook | None = None,
        layer: Any = None,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B N C"]:
        """As `models.blocks.Block`, on a grid without prefix tokens."""
        keys = [layers.fold_key(key, number) for number in range(5)]
        x = self.cpe1(x, grid) if self.cpe1 is not None else x
        y = self.norm1(x)
        y = self.attn(y, grid, context=context, mask=mask, hook=hook, layer=layer, train=train, key=keys[0])
        y = layers.dropout(y, self.dropout, train=train, key=keys[1])
        x = x + layers.drop_path(y, drop_path, train=train, key=keys[2])
        x = self.cpe2(x, grid) if self.cpe2 is not None else x
        if self.mlp is not None and self.norm2 is not None:
            y = self.mlp(self.norm2(x), train=train, key=keys[3])
            x = x + layers.drop_path(y, drop_path, train=train, key=keys[4])
        return partition.over_batch(x)


class OverlappingStem(nnx.Module):
    """A 7 x 7 convolution of stride 4, then a norm."""

    def __init__(self, channels: int, width: int, *, norm_eps: float, init: str, dtype: DType, rngs: nnx.Rngs):
        kernel_init = scheme(init).patch
        self.conv = Conv(channels, width, size=7, stride=4, kernel_init=kernel_init, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(width, eps=norm_eps, dtype=dtype)

    def __call__(self, images: Float[Array, "B Y X I"], *, train: bool = False) -> Float[Array, "B V U C"]:
        """Sides become `ceil(n / 4)`."""
        return self.norm(self.conv(images))


class NormedDownsample(nnx.Module):
    """A norm, then a convolution of stride 2.

    Args:
      size: of the kernel. An odd one overlaps its neighbours and is centred on every other place; an even one begins
        there, and zeros at the right and at the bottom fill the map up to a multiple of it.
    """

    def __init__(
        self, width: int, width_out: int, *, size: int, norm_eps: float, init: str, dtype: DType, rngs: nnx.Rngs
    ):
        self.size = size
        self.norm = LayerNorm(width, eps=norm_eps, dtype=dtype)
        self.conv = Conv(
            width,
            width_out,
            size=size,
            stride=2,
            padding="centred" if size % 2 else "valid",
            kernel_init=scheme(init).patch,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "B Y X C"], *, train: bool = False) -> Float[Array, "B V U O"]:
        """Sides become `ceil(n / 2)` with a kernel of 2 or an odd one."""
        x = self.norm(x)
        return self.conv(x if self.size % 2 else to_multiple(x, (self.size, self.size)))
