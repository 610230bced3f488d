"""What halo and bottleneck attention have in common: projections, and tables of relative positions shared by heads.

Neither has an output projection: in a bottleneck block the pointwise convolution behind takes its place.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attn import Grid
from models.core import sharding
from models.layers.gate import rounded_channels
from models.layers.linear import DType, Linear
from models.layers.pool import pool_half


class _Projections(nnx.Module):
    """What both have in common: widths of heads, and tables of relative positions shared by heads."""

    def __init__(self, width: int, heads: int, width_out: int, head_width: int | None, qk_ratio: float, stride: int):
        if width_out % heads:
            raise ValueError(f"width_out={width_out} of an attention is not divisible by {heads} heads")
        if stride not in (1, 2):
            raise ValueError(f"stride={stride} of an attention; allowed: 1, 2")
        self.width, self.heads, self.width_out, self.stride = width, heads, width_out, stride
        self.head_width = head_width or rounded_channels(width_out * qk_ratio) // heads
        self.value_width = width_out // heads
        if not self.head_width:
            raise ValueError(f"qk_ratio={qk_ratio}: gives {heads} heads no channels")

    def linear(self, parts: int, use_bias: bool, split: str | None, dtype: DType, rngs: nnx.Rngs) -> Linear:
        """A projection to `parts` channels for each head."""
        return Linear(
            self.width,
            self.heads * parts,
            use_bias=use_bias,
            kernel_init=jax.nn.initializers.normal(self.width**-0.5),
            split=split,
            units=(self.heads, "heads") if split else None,
            dtype=dtype,
            rngs=rngs,
        )

    def tables(self, sides: Sequence[int], rngs: nnx.Rngs) -> list[nnx.Param]:
        """Embeddings of relative positions along each axis, `[2 n - 1, D]`."""
        normal = jax.nn.initializers.normal(self.head_width**-0.5)
        return [
            sharding.parameter(normal(rngs.params(), (2 * side - 1, self.head_width), jnp.float32)) for side in sides
        ]

    def to_map(self, x: Float[Array, "B N C"], grid: Grid, context: Any, mask: Any) -> Float[Array, "B Y X C"]:
        """Tokens as a map; ValueError for what has no meaning for attention by places."""
        if context is not None or mask is not None or grid.prefix or len(grid.shape) != 2:
            raise ValueError(
                "halo and bottleneck attention take the places of a map of two axes: no context, no mask, no prefix "
                "tokens (class token, registers)"
            )
        return x.reshape(x.shape[0], *grid.shape, x.shape[-1])


def _tokens(heads: Float[Array, "B Y X H E"], average: bool, sides: Sequence[int]) -> Float[Array, "B N O"]:
    """Heads side by side, averaged if asked for, without what was padded."""
    out = heads.reshape(*heads.shape[:3], -1)
    out = pool_half(out, "avg2", "centred") if average else out
    return out[:, : sides[0], : sides[1]].reshape(out.shape[0], sides[0] * sides[1], -1)
