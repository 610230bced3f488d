"""Halo attention as a module (HaloNet, arXiv:2103.12731)."""

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from attn import Grid, Hook
from attn.halo import halo_attention
from models.attention.relative_projections import _Projections, _tokens
from models.core import sharding
from models.layers.linear import DType


class HaloAttention(_Projections):
    """Blocked local attention with a halo (arXiv:2103.12731), as timm's `HaloAttn`; see `attn.halo_attention`.

    Args:
      block, halo: side of a block, and places around it.
      stride: 2 halves the map: every block has a quarter of the queries.
      average: a stride is attention of all places and then a mean of 2 x 2 of them; so it is, too, for blocks of odd
        side.
      width_out: channels of the values of all heads together, and of the result; `width` unless given.
      head_width: of queries and keys; from `qk_ratio` unless given, which is their channels over `width_out`.
      scale_positions: logits of relative positions are scaled as the others are.
      padding: a map that the blocks do not divide gets zeros on the right and at the bottom before the projections, and
        the result is cropped; timm's refuses such a map, and so does this one unless told.
      dropout: on probabilities.

    Hook sites are those of `DenseAttention`. There a block is an example, `[B * blocks, N, H, D]`.
    """

    def __init__(
        self,
        width: int,
        heads: int = 8,
        *,
        block: int = 8,
        halo: int = 3,
        stride: int = 1,
        average: bool = False,
        width_out: int | None = None,
        head_width: int | None = None,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        scale_positions: bool = False,
        padding: bool = False,
        dropout: float = 0.0,
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(width, heads, width_out or width, head_width, qk_ratio, stride)
        self.padding = padding
        self.block, self.halo, self.scale_positions, self.dropout = block, halo, scale_positions, dropout
        self.average = stride == 2 and (average or block % 2 == 1)
        # Heads are the outer part of keys and values together, so the heads of a device are one piece.
        self.q = self.linear(self.head_width, qkv_bias, "out", dtype, rngs)
        self.kv = self.linear(self.head_width + self.value_width, qkv_bias, "out", dtype, rngs)
        self.height_rel, self.width_rel = self.tables((block + 2 * halo,) * 2, rngs)

    @property
    def multiple(self) -> int:
        """What the sides of a map have to be multiples of."""
        return 1 if self.padding else math.lcm(self.block, self.stride)

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
        """A quarter of the tokens with stride 2. ValueError for a map whose sides are no multiples of `multiple`."""
        places = self.to_map(x, grid, context, mask)
        if any(side % self.multiple for side in grid.shape):
            raise ValueError(f"halo attention: sides of a map of {grid.shape} are no multiples of {self.multiple}")
        rest = [(0, -side % math.lcm(self.block, self.stride)) for side in grid.shape]
        places = jnp.pad(places, [(0, 0), *rest, (0, 0)]) if any(map(any, rest)) else places
        stride = 1 if self.average else self.stride
        q = checkpoint_name(self.q(places[:, ::stride, ::stride]), "attention_qkv")
        kv = checkpoint_name(self.kv(places), "attention_qkv")
        kv = kv.reshape(*kv.shape[:3], self.heads, -1)
        out = halo_attention(
            q.reshape(*q.shape[:3], self.heads, -1),
            kv[..., : self.head_width],
            kv[..., self.head_width :],
            block=self.block,
            halo=self.halo,
            stride=stride,
            height_rel=sharding.gathered(self.height_rel, jnp.float32),
            width_rel=sharding.gathered(self.width_rel, jnp.float32),
            scale_positions=self.scale_positions,
            dropout=self.dropout if train else 0.0,
            key=key,
            hook=hook,
            layer=layer,
        )
        return _tokens(out, self.average, [-(-side // self.stride) for side in grid.shape])
