"""Neighborhood attention as a module: every token of a map sees the window around it (arXiv:2204.07143, 2209.15001)."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attn import Grid, token_neighborhood_attention
from kernels.neighborhood.pattern import make_pattern, per_axis
from models.attention.mechanism import Declaration, Entry, ProjectedMechanism, attended, check_divides, token_index
from models.core import sharding
from models.core.call import Call
from models.layers.linear import DType
from models.layers.pad import cropped, padded
from models.layers.position import relative_bias_table

PerAxis = int | Sequence[int]


class NeighborhoodAttention(ProjectedMechanism):
    """Softmax attention of each place of the grid to the places of its window; projections as in `DenseAttention`.

    Prefix tokens (class, registers) are seen by every place, and see everything. A map smaller than window times
    dilation is padded with zeros on the right and at the bottom before the projections, and cropped after the
    attention, as in the official models: the padding is keys like any others.

    Args:
      window: keys along each axis; an integer is a square window on a map of two axes.
      dilation, stride, is_causal: see `attn.neighborhood_attention`.
      relative_bias: a learned bias of each head by relative position, `[H, 2 window - 1, ...]`.
      scale: of the logits; `head width ** -0.5` unless given.
      dropout: on probabilities; in training it takes the path that has all pairs.
      implementation: see `attn.neighborhood_attention`.

    Sites are over the tokens of the padded map; `"logits"` and `"probs"` `[B, H, N, N]` are over all pairs of them.
    From `"lse"`, `attn.neighborhood_maps` gives the maps of chosen queries.
    """

    declaration = Declaration(
        summary="softmax attention of every place of the grid to the window around it",
        paper="arXiv:2204.07143, arXiv:2209.15001",
        operator="neighborhood_attention",
        cost="4 N C^2 + 2 N w^2 C for windows of w places a side",
        prefix=True,
        masks=("boolean", "lengths", "causal", "window"),
        axes=(1, 2, 3),
    )

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        window: PerAxis = 7,
        dilation: PerAxis = 1,
        stride: PerAxis = 1,
        is_causal: bool | Sequence[bool] = False,
        relative_bias: bool = True,
        scale: float | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: bool = False,
        scale_norm: bool = False,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        implementation: str | None = None,
        init: str = "timm",
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        check_divides(width, heads)
        rank = 2 if isinstance(window, int) else len(window)
        self.window = per_axis("window", window, rank, 1)
        self.dilation = per_axis("dilation", dilation, rank, 1)
        self.stride = per_axis("stride", stride, rank, 1)
        self.is_causal = per_axis("is_causal", is_causal, rank, None)
        # A pattern that is not legal on any map is said now.
        reach = tuple(size * apart for size, apart in zip(self.window, self.dilation, strict=True))
        make_pattern(reach, self.window, stride=self.stride, dilation=self.dilation, is_causal=self.is_causal)
        self.scale, self.dropout, self.implementation = scale, dropout, implementation
        shared: dict[str, Any] = {"norm_eps": norm_eps, "init": init, "dtype": dtype, "rngs": rngs}
        self.make_inputs(width, heads, width // heads, qkv_bias=qkv_bias, qk_norm=qk_norm, **shared)
        extents = [2 * size - 1 for size in self.window]
        self.relative_bias = relative_bias_table(heads, extents, rngs) if relative_bias else None
        self.make_output(width, width, proj_bias=proj_bias, scale_norm=scale_norm, **shared)

    def refuse_map(self, grid: Grid) -> str | None:
        """A map of another number of axes than the window."""
        if len(grid.shape) != len(self.window):
            return f"a window of {self.window} does not fit a map of {tuple(grid.shape)}: give one entry per axis"
        return None

    def attend(self, x: Float[Array, "B N C"], call: Call) -> Float[Array, "B N C"]:
        """A mask takes pairs away from the windows, on the path that has all pairs.

        Raises:
          ValueError: a mask for a map that has to be padded.
        """
        grid = call.grid
        larger = self._larger(grid)
        if call.mask is not None and larger != grid:
            raise ValueError(f"a mask over a map of {grid.shape}, which is padded to {larger.shape}, is not defined")
        bias = None if self.relative_bias is None else sharding.gathered(self.relative_bias, jnp.float32)

        def attend(q: Array, k: Array, v: Array, **options: Any) -> Any:
            return token_neighborhood_attention(
                q,
                k,
                v,
                grid=larger,
                window=self.window,
                stride=self.stride,
                dilation=self.dilation,
                is_causal=self.is_causal,
                scale=self.scale,
                bias=bias,
                mask=call.mask,
                implementation=self.implementation,
                **self.noise(call),
                **options,
            )

        index = token_index(larger) if call.wants("logits", "probs") else None
        heads = attended(call, attend, *self.inputs(padded(x, grid, larger)), index=index, whole=larger.tokens)
        return self.output(cropped(heads.reshape(*heads.shape[:2], -1), larger, grid))

    def _larger(self, grid: Grid) -> Grid:
        reach = [window * dilation for window, dilation in zip(self.window, self.dilation, strict=True)]
        return Grid(tuple(map(max, grid.shape, reach)), grid.prefix)

    def cost(self, grid: Grid) -> int:
        """The formula of the declaration, of the padded map; prefix tokens see everything and are seen by all."""
        larger = self._larger(grid)
        pattern = make_pattern(
            larger.shape, self.window, stride=self.stride, dilation=self.dilation, is_causal=self.is_causal
        )
        keys = 1
        for axis in pattern.axes:
            keys *= axis.window
        pairs = larger.places * (keys + grid.prefix) + grid.prefix * larger.tokens
        inputs = self.qkv.kernel.size * larger.tokens + self.proj.kernel.size * grid.tokens
        return inputs + 2 * pairs * self.proj.kernel.shape[0]


MECHANISMS = (
    Entry(
        "neighborhood",
        NeighborhoodAttention,
        NeighborhoodAttention.declaration,
        for_grid=lambda grid: {"window": (7,) * len(grid.shape)},
    ),
)
