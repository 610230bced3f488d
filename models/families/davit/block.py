"""Blocks of DaViT (arXiv:2204.03645), with convolutions for positions."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from attn import Grid, Hook
from models.core import sharding
from models.hosts.block import BlockOptions
from models.layers import drop as noise
from models.layers.position import ConvPosition


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
        """As `models.hosts.block.Block`, on a grid without prefix tokens."""
        keys = [noise.fold_key(key, number) for number in range(5)]
        x = self.cpe1(x, grid) if self.cpe1 is not None else x
        y = self.norm1(x)
        y = self.attn(y, grid, context=context, mask=mask, hook=hook, layer=layer, train=train, key=keys[0])
        y = noise.dropout(y, self.dropout, train=train, key=keys[1])
        x = x + noise.drop_path(y, drop_path, train=train, key=keys[2])
        x = self.cpe2(x, grid) if self.cpe2 is not None else x
        if self.mlp is not None and self.norm2 is not None:
            y = self.mlp(self.norm2(x), train=train, key=keys[3])
            x = x + noise.drop_path(y, drop_path, train=train, key=keys[4])
        return sharding.over_batch(x)
