"""Blocks of BiFormer (arXiv:2303.08810, section 3.3), and what stands before and between its stages, by name."""

from collections.abc import Callable

from flax import nnx
from jaxtyping import Array, Float

from models.core.init import scheme
from models.hosts.block import Block, BlockOptions, Run
from models.layers.conv import Conv
from models.layers.downsample import NormedConvDownsample, NormFirstDownsample
from models.layers.drop import dropout
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

    def positioned(self, x: Float[Array, "B N C"], run: Run) -> Float[Array, "B N C"]:
        """Tokens of a grid without prefix, with their convolution."""
        if self.position is None:
            return x
        return x + self.position(x.reshape(x.shape[0], *run.call.grid.shape, -1)).reshape(x.shape)

    def forward(self, x, run):
        x = self.positioned(x, run)
        x = x + run.drop(self.ls1(run.attend("attn", self.norm1(x))))
        return x + run.drop(self.ls2(self.feed(self.norm2(x), run)))

    def feed(self, x: Float[Array, "B N C"], run: Run) -> Float[Array, "B N C"]:
        """The MLP; one that mixes neighbours has no dropout inside, and so behind it."""
        y = run.feed("mlp", x)
        if not isinstance(self.mlp, DepthwiseMlp):
            return y
        return dropout(y, self.dropout, train=run.call.train, key=run.call.key_for("mlp.dropout"))


class NormAfterBlock(PositionBlock):
    """`x = norm1(x + attn(x))`, then `x = norm2(x + mlp(x))`, the norms on the sum (arXiv:1706.03762)."""

    def forward(self, x, run):
        x = self.positioned(x, run)
        x = self.norm1(x + run.drop(self.ls1(run.attend("attn", x))))
        return self.norm2(x + run.drop(self.ls2(self.feed(x, run))))


BIFORMER_BLOCKS: dict[str, type[PositionBlock]] = {"pre_norm": PositionBlock, "norm_after": NormAfterBlock}
"""Name -> kind of block, made as `kind(options, rngs, *, positions, depthwise)`."""


LAYOUTS: dict[str, tuple[Callable[..., nnx.Module], Callable[..., nnx.Module]]] = {
    "convolutions": (NormedConvStem, NormedConvDownsample),
    "patches": (NormedPatchStem, NormFirstDownsample),
}
"""Name -> (stem, layer between stages), both made as `layer(width, width_out, *, norm, init, dtype, rngs)`."""
