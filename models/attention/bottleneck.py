"""Attention between all places of a map of one size as a module (BoTNet, arXiv:2101.11605)."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from attn import Grid, Hook
from attn.bottleneck import bottleneck_attention
from models.attention.relative_projections import _Projections, _tokens
from models.core import sharding
from models.layers.linear import DType


class BottleneckAttention(_Projections):
    """Attention between all places of a map of one size (BoTNet, arXiv:2101.11605), as timm's `BottleneckAttn`.

    Args:
      shape: rows and columns of the map, which the tables of relative positions are for.
      stride: 2 takes the mean of 2 x 2 places behind the attention.
      width_out, head_width, qk_ratio, scale_positions, dropout: as in `HaloAttention`.
    """

    def __init__(
        self,
        width: int,
        heads: int = 4,
        *,
        shape: tuple[int, int] | None = None,
        stride: int = 1,
        width_out: int | None = None,
        head_width: int | None = None,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        scale_positions: bool = False,
        dropout: float = 0.0,
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        if shape is None:
            raise ValueError("bottleneck attention: needs the shape of the map that its positions are for")
        super().__init__(width, heads, width_out or width, head_width, qk_ratio, stride)
        self.shape, self.scale_positions, self.dropout = tuple(shape), scale_positions, dropout
        # All queries, all keys, all values: not one piece for the heads of a device, so every device has it whole.
        self.qkv = self.linear(2 * self.head_width + self.value_width, qkv_bias, None, dtype, rngs)
        self.height_rel, self.width_rel = self.tables(self.shape, rngs)

    @property
    def multiple(self) -> int:
        """What the sides of a map have to be multiples of."""
        return self.stride

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
    ) -> Float[Array, "B M O"]:
        """A quarter of the tokens with stride 2. ValueError for a map of another size."""
        places = self.to_map(x, grid, context, mask)
        if grid.shape != self.shape or any(side % self.stride for side in grid.shape):
            raise ValueError(
                f"bottleneck attention: has positions for a map of {self.shape}, not {grid.shape}: give the model the "
                f"image_size, for which the sides of this map have to be multiples of {self.stride}"
            )
        fused = checkpoint_name(self.qkv(places), "attention_qkv")
        cuts = [self.heads * self.head_width, 2 * self.heads * self.head_width]
        q, k, v = (part.reshape(*part.shape[:3], self.heads, -1) for part in jnp.split(fused, cuts, axis=-1))
        out = bottleneck_attention(
            q,
            k,
            v,
            height_rel=sharding.gathered(self.height_rel, jnp.float32),
            width_rel=sharding.gathered(self.width_rel, jnp.float32),
            scale_positions=self.scale_positions,
            dropout=self.dropout if train else 0.0,
            key=key,
            hook=hook,
            layer=layer,
        )
        return _tokens(out, self.stride == 2, [side // self.stride for side in grid.shape])
