"""The layer of MaxViT: a convolution block and two partitioned attentions (arXiv:2204.01697)."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float

from attn import Grid
from models.core import sharding
from models.core.call import Call
from models.core.tap import TOKENS
from models.hosts.block import BlockOptions, PreNormBlock, Run
from models.layers.mbconv import MBConv, MBConvOptions


class MaxViTBlock(nnx.Module):
    """MBConv, attention within blocks and MLP, attention over grids and MLP (arXiv:2204.01697, figure 2).

    Each of the five is a residual branch, dropped by itself. Taps tell the two attentions apart by their paths,
    `"*.attn_block.attn"` and `"*.attn_grid.attn"`.

    Args:
      channels: of the map that comes in; those that go out are the options' width.
      block: of the attention within blocks and its MLP; None leaves them out.
      grid: of the attention over grids and its MLP.
    """

    stride = 1

    def __init__(
        self,
        channels: int,
        convolution: MBConvOptions,
        block: BlockOptions | None,
        grid: BlockOptions,
        rngs: nnx.Rngs,
    ):
        self.conv = MBConv(
            channels,
            grid.width,
            stride=self.stride,
            options=convolution,
            init=grid.init,
            dtype=grid.dtype,
            rngs=rngs,
        )
        self.attn_block = None if block is None else PreNormBlock(block, rngs)
        self.attn_grid = PreNormBlock(grid, rngs)

    def __call__(self, x: Float[Array, "B N C"], call: Call) -> Float[Array, "B N C"]:
        """The new tokens; see `models.hosts.block.Block`."""
        x = self._forward(x.reshape(x.shape[0], *call.grid.shape, -1), call)
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def _forward(self, x: Float[Array, "B Y X I"], call: Call) -> Float[Array, "B V U C"]:
        tokens = call.emit("block.in", x.reshape(x.shape[0], -1, x.shape[-1]), TOKENS)
        x = tokens.reshape(x.shape)
        x = self.conv(x, drop_path=call.drop_path, train=call.train, key=call.key_for("conv"))
        tokens, shape = sharding.over_batch(x.reshape(x.shape[0], -1, x.shape[-1])), x.shape
        for name in ("attn_block", "attn_grid"):
            half = getattr(self, name)
            if half is not None:
                # A half is no block of its own: the residual stream of a layer begins and ends here.
                tokens = sharding.over_batch(half.forward(tokens, Run(half, call.at(name, grid=Grid(shape[1:3])))))
        return call.emit("block.out", tokens, TOKENS).reshape(shape)


class StridedMaxViTBlock(MaxViTBlock):
    """The first layer of a stage: its MBConv has stride 2 and changes the width. Made as `MaxViTBlock`."""

    stride = 2

    def __call__(self, x: Float[Array, "B Y X I"], call: Call) -> Float[Array, "B V U C"]:  # type: ignore[override]
        """A map to a map of `ceil(n / 2)` places along each axis."""
        return self._forward(x, call)
