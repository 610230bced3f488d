"""The layer of MaxViT: a convolution block and two partitioned attentions (arXiv:2204.01697)."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from attn import Grid, Hook
from models.core import sharding
from models.hosts.block import BlockOptions, PreNormBlock
from models.layers.drop import fold_key
from models.layers.mbconv import MBConv, MBConvOptions


class MaxViTBlock(nnx.Module):
    """MBConv, attention within blocks and MLP, attention over grids and MLP (arXiv:2204.01697, figure 2).

    Each of the five is a residual branch, dropped by itself. At the hook sites the attention within blocks comes first.

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
        """The new tokens; arguments as those of `models.hosts.block.Block`."""
        x = x.reshape(x.shape[0], *grid.shape, -1)
        options = {"drop_path": drop_path, "context": context, "mask": mask, "hook": hook, "layer": layer}
        x = self._forward(x, options, train, key)
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def _forward(
        self, x: Float[Array, "B Y X I"], options: dict[str, Any], train: bool, key: PRNGKeyArray | None
    ) -> Float[Array, "B V U C"]:
        x = self.conv(x, drop_path=options["drop_path"], train=train, key=fold_key(key, 0))
        tokens, shape = sharding.over_batch(x.reshape(x.shape[0], -1, x.shape[-1])), x.shape
        for number, half in enumerate((self.attn_block, self.attn_grid), start=1):
            if half is not None:
                tokens = half(tokens, Grid(shape[1:3]), **options, train=train, key=fold_key(key, number))
        return tokens.reshape(shape)


class StridedMaxViTBlock(MaxViTBlock):
    """The first layer of a stage: its MBConv has stride 2 and changes the width. Made as `MaxViTBlock`."""

    stride = 2

    def __call__(  # type: ignore[override]
        self,
        x: Float[Array, "B Y X I"],
        *,
        drop_path: float | Array = 0.0,
        hook: Hook | None = None,
        layer: Any = None,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B V U C"]:
        """A map to a map of `ceil(n / 2)` places along each axis."""
        return self._forward(x, {"drop_path": drop_path, "hook": hook, "layer": layer}, train, key)
