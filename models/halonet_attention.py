"""Halo and bottleneck attention as modules: the spatial layer of HaloNet's and BoTNet's blocks, with its projections.

Neither has an output projection: in a bottleneck block the pointwise convolution behind takes its place.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from attn import Grid, Hook
from attn.halo import halo_attention
from attn.relative_logits import bottleneck_attention
from models import partition
from models.layers import DType, Linear
from models.mbconv import pool_half
from models.squeeze_excite import rounded_channels


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
            partition.parameter(normal(rngs.params(), (2 * side - 1, self.head_width), jnp.float32)) for side in sides
        ]

    def to_map(self, x: Float[Array, "B N C"], grid: Grid, context: Any, mask: Any) -> Float[Array, "B Y X C"]:
        """Tokens as a map; ValueError for what has no meaning for attention by places."""
        if context is not None or mask is not None or grid.prefix or len(grid.shape) != 2:
            raise ValueError(
                "halo and bottleneck attention take the places of a map of two axes: no context, no mask, no prefix "
                "tokens (class token, registers)"
            )
        return x.reshape(x.shape[0], *grid.shape, x.shape[-1])


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
            height_rel=partition.gathered(self.height_rel, jnp.float32),
            width_rel=partition.gathered(self.width_rel, jnp.float32),
            scale_positions=self.scale_positions,
            dropout=self.dropout if train else 0.0,
            key=key,
            hook=hook,
            layer=layer,
        )
        return _tokens(out, self.average, [-(-side // self.stride) for side in grid.shape])


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
            height_rel=partition.gathered(self.height_rel, jnp.float32),
            width_rel=partition.gathered(self.width_rel, jnp.float32),
            scale_positions=self.scale_positions,
            dropout=self.dropout if train else 0.0,
            key=key,
            hook=hook,
            layer=layer,
        )
        return _tokens(out, self.stride == 2, [side // self.stride for side in grid.shape])


def _tokens(heads: Float[Array, "B Y X H E"], average: bool, sides: Sequence[int]) -> Float[Array, "B N O"]:
    """Heads side by side, averaged if asked for, without what was padded."""
    out = heads.reshape(*heads.shape[:3], -1)
    out = pool_half(out, "avg2", "centred") if average else out
    return out[:, : sides[0], : sides[1]].reshape(out.shape[0], sides[0] * sides[1], -1)
