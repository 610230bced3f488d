"""Attention between all places of a map of one size as a module (BoTNet, arXiv:2101.11605)."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from attn import Grid, bottleneck_attention
from models.attention.mechanism import Declaration, Entry, attended, token_index
from models.attention.relative_projections import RelativeAttention, side_by_side
from models.core.call import Call
from models.layers.linear import DType


class BottleneckAttention(RelativeAttention):
    """Attention between all places of a map of one size (BoTNet, arXiv:2101.11605), as timm's `BottleneckAttn`.

    Args:
      shape: rows and columns of the map, which the tables of relative positions are for.
      stride: 2 takes the mean of 2 x 2 places behind the attention.
      width_out, head_width, qk_ratio, scale_positions, dropout: as in `HaloAttention`.
      implementation: see `attn.dense_attention`.
    """

    declaration = Declaration(
        summary="dense attention with logits by relative position, for a map of one shape",
        paper="arXiv:2101.11605",
        operator="bottleneck_attention",
        cost="3 N C^2 + 2 N^2 C + N (Y + X) C for a map of Y by X places",
        any_size=False,
        shape="heads",
    )

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
        implementation: str | None = None,
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        if shape is None or len(shape) != 2:
            raise ValueError(f"shape={shape} of bottleneck attention: needs rows and columns of the map it is for")
        super().__init__(width, heads, width_out or width, head_width, qk_ratio, stride)
        self.shape, self.scale_positions, self.dropout = tuple(shape), scale_positions, dropout
        self.implementation = implementation
        # All queries, all keys, all values: not one piece for the heads of a device, so every device has it whole.
        self.qkv = self.linear(2 * self.head_width + self.value_width, qkv_bias, None, dtype, rngs)
        self.height_rel, self.width_rel = self.tables(self.shape, rngs)

    @property
    def multiple(self) -> int:
        """What the sides of a map have to be multiples of."""
        return self.stride

    def refuse_map(self, grid: Grid) -> str | None:
        """A map of another size."""
        if tuple(grid.shape) != self.shape or any(side % self.stride for side in grid.shape):
            return (
                f"bottleneck attention: has positions for a map of {self.shape}, not {tuple(grid.shape)}: give the "
                f"model the image_size, for which the sides of this map have to be multiples of {self.stride}"
            )
        return None

    def attend(self, x: Float[Array, "B N C"], call: Call) -> Float[Array, "B M O"]:
        """A quarter of the tokens with stride 2."""
        shape = call.grid.shape
        fused = checkpoint_name(self.qkv(x), "attention_qkv")
        cuts = [self.heads * self.head_width, 2 * self.heads * self.head_width]
        q, k, v = (part.reshape(*part.shape[:2], self.heads, -1) for part in jnp.split(fused, cuts, axis=-1))

        def attend(q: Array, k: Array, v: Array, **options: Any) -> Any:
            q, k, v = (x.reshape(x.shape[0], *shape, *x.shape[2:]) for x in (q, k, v))
            found = bottleneck_attention(
                q,
                k,
                v,
                scale_positions=self.scale_positions,
                implementation=self.implementation,
                **self.positions(),
                **self.noise(call),
                **options,
            )
            parts = [x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (found if options["return_lse"] else (found,))]
            return tuple(parts) if options["return_lse"] else parts[0]

        index = token_index(call.grid) if call.wants("logits", "probs") else None
        heads = attended(call, attend, q, k, v, index=index, whole=call.grid.places)
        sides = [side // self.stride for side in shape]
        return side_by_side(heads.reshape(heads.shape[0], *shape, *heads.shape[2:]), self.stride == 2, sides)

    def cost(self, grid: Grid) -> int:
        """The formula of the declaration."""
        count, inside = grid.places, self.heads * self.head_width
        pairs = count**2 * self.heads * (self.head_width + self.value_width)
        return count * self.qkv.kernel.size + pairs + count * sum(grid.shape) * inside


MECHANISMS = (
    Entry(
        "bottleneck",
        BottleneckAttention,
        BottleneckAttention.declaration,
        for_grid=lambda grid: {"shape": tuple(grid.shape)},
    ),
)
