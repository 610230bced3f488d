"""Blocks and layers between stages of BiFormer (arXiv:2303.08810, section 3.3)."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from attn import Grid
from models.batch_norm import BatchNorm
from models.blocks import Block, BlockOptions
from models.convolution import Conv
from models.init import scheme
from models.layers import DType, LayerNorm, Linear
from models.mlp import ACTIVATIONS

NORMS: dict[str, Callable[..., nnx.Module]] = {"batch": BatchNorm, "layer": LayerNorm}
"""Name -> norm of a map, made as `norm(width, *, eps, dtype)`."""


def normed(norm: nnx.Module, x: Float[Array, "... C"], *, train: bool) -> Float[Array, "... C"]:
    """A norm of `NORMS` on a map or on tokens."""
    return norm(x, train=train) if isinstance(norm, BatchNorm) else norm(x)  # type: ignore[operator]


class PositionBlock(Block):
    """`x += conv(x)`, depthwise 3 x 3, whose padding tells where the border is (conditional positions); then as
    `models.blocks.PreNormBlock`.

    With `positions=False` the convolution is left out; with `depthwise` the MLP is a `DepthwiseMlp`.
    """

    def __init__(self, options: BlockOptions, rngs: nnx.Rngs, *, positions: bool = True, depthwise: bool = False):
        self.dropout = options.dropout
        self.norm1, self.attn, self.ls1 = options.make_norm(), options.make_attention(rngs), options.make_layer_scale()
        self.norm2, self.ls2 = options.make_norm(), options.make_layer_scale()
        self.mlp = DepthwiseMlp(options, rngs) if depthwise else options.make_mlp(rngs)
        self.position = (
            Conv(
                options.width,
                options.width,
                size=3,
                groups=options.width,
                kernel_init=scheme(options.init).patch,
                dtype=options.dtype,
                rngs=rngs,
            )
            if positions
            else None
        )

    def __call__(self, x: Float[Array, "B N C"], grid: Grid, **arguments: Any) -> Float[Array, "B N C"]:
        """As `Block`, on a grid without prefix tokens."""
        if self.position is not None:
            x = x + self.position(x.reshape(x.shape[0], *grid.shape, -1)).reshape(x.shape)
        return super().__call__(x, grid, **arguments)

    def branches(self, attend: Callable, feed: Callable) -> tuple[Callable, Callable]:
        """Attention and MLP with their layer scales, functions of tokens."""
        # What mixes neighbours is called with the grid, as attention is.
        mix = attend if isinstance(self.mlp, DepthwiseMlp) else feed
        return lambda x: self.ls1(attend(self.attn, x)), lambda x: self.ls2(mix(self.mlp, x))

    def forward(self, x, attend, feed, drop):
        attention, mlp = self.branches(attend, feed)
        x = x + drop(attention(self.norm1(x)))
        return x + drop(mlp(self.norm2(x)))


class NormAfterBlock(PositionBlock):
    """`x = norm1(x + attn(x))`, then `x = norm2(x + mlp(x))`, the norms on the sum (arXiv:1706.03762)."""

    def forward(self, x, attend, feed, drop):
        attention, mlp = self.branches(attend, feed)
        x = self.norm1(x + drop(attention(x)))
        return self.norm2(x + drop(mlp(x)))


BIFORMER_BLOCKS: dict[str, type[PositionBlock]] = {"pre_norm": PositionBlock, "norm_after": NormAfterBlock}
"""Name -> kind of block, made as `kind(options, rngs, *, positions, depthwise)`."""


class DepthwiseMlp(nnx.Module):
    """Linear, depthwise 3 x 3 convolution, activation, Linear; called as an attention module is."""

    def __init__(self, options: BlockOptions, rngs: nnx.Rngs):
        self.activation = options.activation
        width, hidden, start = options.width, options.mlp_width, scheme(options.init)
        shared = {"dtype": options.dtype, "rngs": rngs}
        units = {"units": (hidden, "hidden units"), "kernel_init": start.linear, **shared}
        self.fc1 = Linear(width, hidden, split="out", **units)
        self.conv = Conv(hidden, hidden, size=3, groups=hidden, kernel_init=start.patch, **shared)
        self.fc2 = Linear(hidden, width, split="in", **units)

    def __call__(self, x: Float[Array, "B N C"], grid: Grid, **_: Any) -> Float[Array, "B N C"]:
        """On a grid without prefix tokens."""
        y = self.fc1(x)
        y = self.conv(y.reshape(y.shape[0], *grid.shape, -1)).reshape(y.shape)
        return self.fc2(ACTIVATIONS[self.activation](y))


# --- stems and downsampling -------------------------------------------------------------------------------------------


class NormedConvStem(nnx.Module):
    """Two 3 x 3 convolutions of stride 2, each with a batch norm, and GELU between them."""

    def __init__(self, channels: int, width: int, *, norm: str, init: str, dtype: DType, rngs: nnx.Rngs):
        shared = {"size": 3, "stride": 2, "kernel_init": scheme(init).patch, "dtype": dtype, "rngs": rngs}
        self.conv1 = Conv(channels, width // 2, **shared)
        self.norm1 = NORMS[norm](width // 2, dtype=dtype)
        self.conv2 = Conv(width // 2, width, **shared)
        self.norm2 = NORMS[norm](width, dtype=dtype)

    def __call__(self, images: Float[Array, "B Y X I"], *, train: bool = False) -> Float[Array, "B V U C"]:
        """Sides become `ceil(ceil(n / 2) / 2)`."""
        x = ACTIVATIONS["gelu"](normed(self.norm1, self.conv1(images), train=train))
        return normed(self.norm2, self.conv2(x), train=train)


class NormedPatchStem(nnx.Module):
    """Patches of 4 x 4 pixels, each mapped to `width` channels, then a norm (Swin's layout)."""

    def __init__(self, channels: int, width: int, *, norm: str, init: str, dtype: DType, rngs: nnx.Rngs):
        self.conv = Conv(
            channels,
            width,
            size=4,
            stride=4,
            padding="valid",
            kernel_init=scheme(init).patch,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = NORMS[norm](width, dtype=dtype)

    def __call__(self, images: Float[Array, "B Y X I"], *, train: bool = False) -> Float[Array, "B V U C"]:
        """Sides become `floor(n / 4)`: what is left over at the right and the bottom is not seen, as officially."""
        return normed(self.norm, self.conv(images), train=train)


class NormedConvDownsample(nnx.Module):
    """A 3 x 3 convolution of stride 2, then a batch norm."""

    def __init__(self, width: int, width_out: int, *, norm: str, init: str, dtype: DType, rngs: nnx.Rngs):
        kernel_init = scheme(init).patch
        self.conv = Conv(width, width_out, size=3, stride=2, kernel_init=kernel_init, dtype=dtype, rngs=rngs)
        self.norm = NORMS[norm](width_out, dtype=dtype)

    def __call__(self, x: Float[Array, "B Y X C"], *, train: bool = False) -> Float[Array, "B V U O"]:
        """Sides become `ceil(n / 2)`."""
        return normed(self.norm, self.conv(x), train=train)


class NormFirstDownsample(nnx.Module):
    """A norm, then squares of 2 x 2 places, each mapped to the new channels (Swin's layout)."""

    def __init__(self, width: int, width_out: int, *, norm: str, init: str, dtype: DType, rngs: nnx.Rngs):
        self.norm = NORMS[norm](width, dtype=dtype)
        kernel_init = scheme(init).patch
        self.conv = Conv(
            width, width_out, size=2, stride=2, padding="valid", kernel_init=kernel_init, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "B Y X C"], *, train: bool = False) -> Float[Array, "B V U O"]:
        """Sides become `floor(n / 2)`, as officially."""
        return self.conv(normed(self.norm, x, train=train))


LAYOUTS: dict[str, tuple[Callable[..., nnx.Module], Callable[..., nnx.Module]]] = {
    "convolutions": (NormedConvStem, NormedConvDownsample),
    "patches": (NormedPatchStem, NormFirstDownsample),
}
"""Name -> (stem, layer between stages), both made as `layer(width, width_out, *, norm, init, dtype, rngs)`."""
