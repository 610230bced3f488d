"""Blocks of DaViT (arXiv:2204.03645), with convolutions for positions."""

from __future__ import annotations

from typing import Any

from flax import nnx

from models.hosts.block import Block, BlockOptions
from models.layers.position import ConvPosition


class PositionedBlock(Block):
    """`x = cpe1(x)`, `x += attn(norm1(x))`, `x = cpe2(x)`, `x += mlp(norm2(x))` (figure 3), on a grid without prefix
    tokens.

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
        position: dict[str, Any] = {"activation": position_activation, "init": options.init}
        position |= {"dtype": options.dtype, "rngs": rngs}
        self.cpe1 = ConvPosition(options.width, **position) if positions else None
        self.norm1, self.attn = options.make_norm(), options.make_attention(rngs)
        self.cpe2 = ConvPosition(options.width, **position) if positions else None
        self.norm2 = options.make_norm() if feed_forward else None
        self.mlp = options.make_mlp(rngs) if feed_forward else None

    def forward(self, x, run):
        grid = run.call.grid
        x = self.cpe1(x, grid) if self.cpe1 is not None else x
        x = x + run.drop(run.attend("attn", self.norm1(x)))
        x = self.cpe2(x, grid) if self.cpe2 is not None else x
        return x + run.drop(run.feed("mlp", self.norm2(x))) if self.norm2 is not None else x
