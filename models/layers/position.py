"""What tells places apart: tables of bias by relative position, and convolutions whose padding shows the border."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attn import Grid
from models.core import sharding
from models.core.init import normal, scheme
from models.core.sharding import Split
from models.layers.activation import ACTIVATIONS
from models.layers.conv import Conv
from models.layers.linear import DType


def relative_bias_table(heads: int, extents: Sequence[int], rngs: nnx.Rngs) -> nnx.Param:
    """A learned bias of each head by relative position, `[H, *extents]`, split over `tensor` by heads."""
    table = normal(0.02)(rngs.params(), (heads, *extents), jnp.float32)
    return sharding.parameter(table, Split(-1 - len(extents), heads, "heads"))


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
