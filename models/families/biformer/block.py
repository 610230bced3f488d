"""Blocks of BiFormer (arXiv:2303.08810, section 3.3), and what stands before and between its stages, by name."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from attn import Grid
from models.core.init import scheme
from models.hosts.block import Block, BlockOptions
from models.layers.conv import Conv
from models.layers.downsample import NormedConvDownsample, NormFirstDownsample
from models.layers.mlp import DepthwiseMlp
from models.layers.stem import NormedConvStem, NormedPatchStem


class PositionBlock(Block):
    """`x += conv(x)`, depthwise 3 x 3, whose padding tells where the border is (conditional positions); then as
    `models.hosts.block.PreNormBlock`.

    With `positions=False` the convolution is left out; with `depthwise` the MLP is a `DepthwiseMlp`.
    """

    def __init__(self, options: BlockOptions, rngs: nnx.Rngs, *, positions: bool = True, depthwise: bool = False):
        self.dropout = options.dropout
        self.norm1, self.attn, self.ls1 = options.make_norm(), options.make_attention(rngs), options.make_layer_scale()
        self.norm2, self.ls2 = options.make_norm(), options.make_layer_scale()
        own = {"activation": options.activation, "init": options.init, "dtype": options.dtype, "rngs": rngs}
        self.mlp = DepthwiseMlp(options.width, options.mlp_width, **own) if depthwise else options.make_mlp(rngs)
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


LAYOUTS: dict[str, tuple[Callable[..., nnx.Module], Callable[..., nnx.Module]]] = {
    "convolutions": (NormedConvStem, NormedConvDownsample),
    "patches": (NormedPatchStem, NormFirstDownsample),
}
"""Name -> (stem, layer between stages), both made as `layer(width, width_out, *, norm, init, dtype, rngs)`."""
