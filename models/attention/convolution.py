"""Convolutions in the place of attention (BiFormer, arXiv:2303.08810, official code)."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from attn import Grid
from attn.core.arguments import check_counts
from models.attention.mechanism import Declaration, Entry, Mechanism
from models.core.call import Call
from models.core.init import scheme
from models.layers.conv import Conv
from models.layers.linear import DType, Linear


class ConvolutionMixer(Mechanism):
    """A linear layer, a depthwise convolution and a linear layer; no attention at all (BiFormer's `topk=0`).

    `heads` are accepted, as by every mechanism, and do nothing.

    Args:
      size: side of the depthwise kernel.
    """

    declaration = Declaration(
        summary="a depthwise convolution between two linear layers, no attention",
        paper="arXiv:2303.08810",
        operator="",
        cost="2 N C^2 + 25 N C",
        sites=(),
    )

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        size: int = 5,
        proj_bias: bool = True,
        init: str = "timm",
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        check_counts(1, size=size)
        start = scheme(init)
        shared: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.fc1 = Linear(width, width, use_bias=proj_bias, kernel_init=start.linear, split="out", **shared)
        self.conv = Conv(width, width, size=size, groups=width, kernel_init=start.patch, **shared)
        self.fc2 = Linear(width, width, use_bias=proj_bias, kernel_init=start.linear, split="in", **shared)

    def attend(self, x: Float[Array, "B N C"], call: Call) -> Float[Array, "B N C"]:
        """New tokens."""
        y = self.fc1(x)
        return self.fc2(self.conv(y.reshape(y.shape[0], *call.grid.shape, -1)).reshape(y.shape))

    def cost(self, grid: Grid) -> int:
        """The formula of the declaration."""
        return grid.places * (self.fc1.kernel.size + self.fc2.kernel.size + self.conv.kernel.size)


MECHANISMS = (Entry("convolution", ConvolutionMixer, ConvolutionMixer.declaration),)
