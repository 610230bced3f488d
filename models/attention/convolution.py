"""Convolutions in the place of attention (BiFormer, arXiv:2303.08810, official code)."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from attn import Grid, Hook
from models.core.init import scheme
from models.layers.conv import Conv
from models.layers.linear import DType, Linear


class ConvolutionMixer(nnx.Module):
    """A linear layer, a depthwise convolution and a linear layer; no attention at all (BiFormer's `topk=0`).

    `heads` are accepted, as by every mechanism, and do nothing. There are no hook sites.

    Args:
      size: side of the depthwise kernel.
    """

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
        start = scheme(init)
        shared = {"dtype": dtype, "rngs": rngs}
        self.fc1 = Linear(width, width, use_bias=proj_bias, kernel_init=start.linear, split="out", **shared)
        self.conv = Conv(width, width, size=size, groups=width, kernel_init=start.patch, **shared)
        self.fc2 = Linear(width, width, use_bias=proj_bias, kernel_init=start.linear, split="in", **shared)

    def __call__(
        self,
        x: Float[Array, "B N C"],
        grid: Grid,
        *,
        context: Array | None = None,
        mask: Array | None = None,
        hook: Hook | None = None,
        layer: Any = None,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B N C"]:
        """ValueError for prefix tokens and for a grid of other than two axes. The rest of the arguments do nothing."""
        _check_map(grid)
        y = self.fc1(x)
        return self.fc2(self.conv(y.reshape(y.shape[0], *grid.shape, -1)).reshape(y.shape))


def _check_map(grid: Grid) -> None:
    if grid.prefix or len(grid.shape) != 2:
        raise ValueError(
            f"a convolution needs a map of two axes without prefix tokens; given {grid.shape} and {grid.prefix} of them"
        )
