"""Halo attention as a module (HaloNet, arXiv:2103.12731)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from attn import Grid, halo_attention
from attn.common.windows import to_windows
from attn.core.arguments import check_counts
from attn.halo import haloed_windows
from models.attention.mechanism import WINDOWS, Declaration, Entry, attended
from models.attention.relative_projections import RelativeAttention, side_by_side
from models.core.call import Call
from models.core.tap import TokenIndex
from models.layers.linear import DType


class HaloAttention(RelativeAttention):
    """Blocked local attention with a halo (arXiv:2103.12731), as timm's `HaloAttn`; see `attn.halo_attention`.

    Args:
      block_size, halo_size: side of a block, and places around it.
      stride: 2 halves the map: every block has a quarter of the queries.
      average: a stride is attention of all places and then a mean of 2 x 2 of them; so it is, too, for blocks of odd
        side.
      width_out: channels of the values of all heads together, and of the result; `width` unless given.
      head_width: of queries and keys; from `qk_ratio` unless given, which is their channels over `width_out`.
      scale_positions: logits of relative positions are scaled as the others are.
      padding: a map that the blocks do not divide gets zeros on the right and at the bottom before the projections, and
        the result is cropped; timm's refuses such a map, and so does this one unless told.
      dropout: on probabilities.
      implementation: see `attn.halo_attention`.

    Maps are `[B, blocks, H, N, M]`, the queries of a block and the keys of its window; queries are those of the
    (padded, strided) map, keys those of the padded one.
    """

    declaration = Declaration(
        summary="softmax attention of every place of a block to the window around the block",
        paper="arXiv:2103.12731",
        operator="halo_attention",
        cost="3 N C^2 + 2 N w^2 C + 2 N w C for windows of w = block + 2 halo places a side",
        any_size=False,
        shape="heads",
    )

    def __init__(
        self,
        width: int,
        heads: int = 8,
        *,
        block_size: int = 8,
        halo_size: int = 3,
        stride: int = 1,
        average: bool = False,
        width_out: int | None = None,
        head_width: int | None = None,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        scale_positions: bool = False,
        padding: bool = False,
        dropout: float = 0.0,
        implementation: str | None = None,
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(width, heads, width_out or width, head_width, qk_ratio, stride)
        check_counts(1, block_size=block_size)
        check_counts(0, halo_size=halo_size)
        self.padding, self.implementation = padding, implementation
        self.block_size, self.halo_size = block_size, halo_size
        self.scale_positions, self.dropout = scale_positions, dropout
        self.average = stride == 2 and (average or block_size % 2 == 1)
        # Heads are the outer part of keys and values together, so the heads of a device are one piece.
        self.q = self.linear(self.head_width, qkv_bias, "out", dtype, rngs)
        self.kv = self.linear(self.head_width + self.value_width, qkv_bias, "out", dtype, rngs)
        self.height_rel, self.width_rel = self.tables((block_size + 2 * halo_size,) * 2, rngs)

    @property
    def multiple(self) -> int:
        """What the sides of a map have to be multiples of."""
        return 1 if self.padding else math.lcm(self.block_size, self.stride)

    def refuse_map(self, grid: Grid) -> str | None:
        """A map whose sides are no multiples of a block."""
        if any(side % self.multiple for side in grid.shape):
            sides = tuple(grid.shape)
            return (
                f"halo attention: sides of a map of {sides} are no multiples of {self.multiple}; padding=True fills up"
            )
        return None

    def attend(self, x: Float[Array, "B N C"], call: Call) -> Float[Array, "B M O"]:
        """A quarter of the tokens with stride 2."""
        shape, larger, stride = call.grid.shape, self._larger(call.grid), 1 if self.average else self.stride
        places = x.reshape(x.shape[0], *shape, x.shape[-1])
        rest = [(0, after - before) for before, after in zip(shape, larger, strict=True)]
        places = jnp.pad(places, [(0, 0), *rest, (0, 0)]) if any(map(any, rest)) else places
        q = checkpoint_name(self.q(places[:, ::stride, ::stride]), "attention_qkv")
        kv = checkpoint_name(self.kv(places), "attention_qkv")
        kv = kv.reshape(kv.shape[0], math.prod(larger), self.heads, -1)
        smaller = q.shape[1:3]

        def attend(q: Array, k: Array, v: Array, **options: Any) -> Any:
            k, v = (x.reshape(x.shape[0], *larger, *x.shape[2:]) for x in (k, v))
            found = halo_attention(
                q.reshape(q.shape[0], *smaller, *q.shape[2:]),
                k,
                v,
                block_size=self.block_size,
                halo_size=self.halo_size,
                stride=stride,
                scale_positions=self.scale_positions,
                implementation=self.implementation,
                **self.positions(),
                **self.noise(call),
                **options,
            )
            parts = [x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (found if options["return_lse"] else (found,))]
            return tuple(parts) if options["return_lse"] else parts[0]

        index = self._index(larger, stride) if call.wants("logits", "probs") else None
        heads = attended(
            call,
            attend,
            q.reshape(q.shape[0], -1, self.heads, self.head_width),
            kv[..., : self.head_width],
            kv[..., self.head_width :],
            axes=WINDOWS,
            index=index,
            whole=math.prod(larger),
        )
        sides = [-(-side // self.stride) for side in shape]
        return side_by_side(heads.reshape(heads.shape[0], *smaller, *heads.shape[2:]), self.average, sides)

    def _larger(self, grid: Grid) -> tuple[int, ...]:
        step = math.lcm(self.block_size, self.stride)
        return tuple(-(-side // step) * step for side in grid.shape)

    def _index(self, shape: tuple[int, ...], stride: int) -> TokenIndex:
        rows, columns = (side // stride for side in shape)
        side = self.block_size // stride
        with jax.ensure_compile_time_eval():
            places = jnp.arange(rows * columns).reshape(1, rows, columns, 1)
            queries = np.asarray(to_windows(places, (side, side)))[..., 0]
            # Counted from 1, so that what lies outside the map, zero, is -1.
            numbers = jnp.arange(1, math.prod(shape) + 1).reshape(1, *shape, 1)
            keys = np.asarray(haloed_windows(numbers, self.block_size, self.halo_size))[..., 0] - 1
        return TokenIndex(queries, keys, (Grid((rows, columns)), Grid(tuple(shape))))

    def cost(self, grid: Grid) -> int:
        """The formula of the declaration, of the padded map, with the queries that there are."""
        places = math.prod(self._larger(grid))
        queries = places // (1 if self.average else self.stride**2)
        window = self.block_size + 2 * self.halo_size
        pairs = queries * window**2 * self.heads
        relative = 2 * queries * window * self.heads * self.head_width
        linear = queries * self.q.kernel.size + places * self.kv.kernel.size
        return linear + pairs * (self.head_width + self.value_width) + relative


MECHANISMS = (Entry("halo", HaloAttention, HaloAttention.declaration),)
