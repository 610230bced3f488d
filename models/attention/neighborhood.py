"""Neighborhood attention as a module: every token of a map sees the window around it (arXiv:2204.07143, 2209.15001)."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from attn import Grid, Hook, dense_attention, neighborhood_attention
from attn.common.relative import relative_position_bias
from kernels.neighborhood.pattern import make_pattern, per_axis
from models.core import sharding
from models.core.init import scheme
from models.core.tap import sees_probabilities
from models.layers.linear import DType, Linear, project_qkv
from models.layers.norm import LayerNorm
from models.layers.pad import cropped, padded
from models.layers.position import relative_bias_table

PerAxis = int | Sequence[int]


class NeighborhoodAttention(nnx.Module):
    """Softmax attention of each place of the grid to the places of its window; projections as in `DenseAttention`.

    Prefix tokens (class, registers) are seen by every place, and see everything. A map smaller than window times
    dilation is padded with zeros on the right and at the bottom before the projections, and cropped after the
    attention, as in the official models: the padding is keys like any others.

    Args:
      window: keys along each axis; an integer is a square window on a map of two axes.
      dilation, stride, is_causal: see `attn.neighborhood_attention`.
      relative_bias: a learned bias of each head by relative position, `[H, 2 window - 1, ...]`.
      scale: of the logits; `head width ** -0.5` unless given.
      dropout: on probabilities; in training it takes the path below.
      implementation: see `attn.neighborhood_attention`.

    Hook sites are those of `DenseAttention`, over the tokens of the padded map. `"logits"` and `"probs"` `[B, H, N, N]`
    exist on a path that masks dense attention: a hook takes it, unless it says by an attribute `sites` that it looks
    at neither (`models/core/tap.py`). Then the fused path runs, and there is `"lse"` `[B, *S, H]` besides, from which
    `attn.common.probabilities` gives the maps of chosen queries.
    """

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
        init: str = "timm",
        implementation: str | None = None,
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        rank = 2 if isinstance(window, int) else len(window)
        self.window = per_axis("window", window, rank, 1)
        self.dilation = per_axis("dilation", dilation, rank, 1)
        self.stride = per_axis("stride", stride, rank, 1)
        self.is_causal = per_axis("is_causal", is_causal, rank, None)
        self.heads, self.scale, self.dropout, self.implementation = heads, scale, dropout, implementation
        start = scheme(init)
        split = {"units": (heads, "heads"), "dtype": dtype, "rngs": rngs}
        self.qkv = Linear(width, 3 * width, use_bias=qkv_bias, kernel_init=start.qkv, split="parts", **split)
        self.q_norm = LayerNorm(width // heads, eps=norm_eps, dtype=dtype) if qk_norm else None
        self.k_norm = LayerNorm(width // heads, eps=norm_eps, dtype=dtype) if qk_norm else None
        extents = [2 * size - 1 for size in self.window]
        self.relative_bias = relative_bias_table(heads, extents, rngs) if relative_bias else None
        self.norm = LayerNorm(width, eps=norm_eps, dtype=dtype) if scale_norm else None
        self.proj = Linear(width, width, use_bias=proj_bias, kernel_init=start.linear, split="in", **split)

    def __call__(
        self,
        x: Float[Array, "B N C"],
        grid: Grid,
        *,
        context: Array | None = None,
        mask: Bool[Array, "#B #H #N N"] | None = None,
        hook: Hook | None = None,
        layer: Any = None,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B N C"]:
        """A `mask` takes pairs away from the windows, on the path that masks dense attention.

        Raises:
          ValueError: a context, whose tokens have no neighborhood; a mask for a map that has to be padded; a map of
            another number of axes than the window.
        """
        if context is not None:
            raise ValueError("neighborhood attention has no context: its tokens would be nobody's neighbors")
        if len(grid.shape) != len(self.window):
            raise ValueError(f"a window of {self.window} does not fit a map of {grid.shape}: give one entry per axis")
        reach = [window * dilation for window, dilation in zip(self.window, self.dilation, strict=True)]
        larger = Grid(tuple(map(max, grid.shape, reach)), grid.prefix)
        if mask is not None and larger != grid:
            raise ValueError(f"a mask over a map of {grid.shape}, which is padded to {larger.shape}, is not defined")

        q, k, v = project_qkv(self.qkv, padded(x, grid, larger), None, self.heads)
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        edit = (lambda site, value: hook(site, value, layer)) if hook else (lambda site, value: value)
        dropout = self.dropout if train else 0.0
        if mask is not None or dropout or sees_probabilities(hook):
            allowed, bias = self._as_mask(larger, mask)
            heads = dense_attention(
                q, k, v, mask=allowed, bias=bias, scale=self.scale, dropout=dropout, key=key, hook=hook, layer=layer
            )
        else:
            heads, lse = self._fused(edit("q", q), edit("k", k), edit("v", v), larger, with_lse=hook is not None)
            if lse is not None:
                edit("lse", lse)
            heads = edit("heads", heads)
        heads = cropped(heads.reshape(*heads.shape[:2], -1), larger, grid)
        return self.proj(heads if self.norm is None else self.norm(heads))

    def _fused(self, q: Array, k: Array, v: Array, grid: Grid, *, with_lse: bool) -> tuple[Array, Array | None]:
        """`[B, N, H, D]` by the fused operator for the map and dense attention for the few prefix queries, and the
        logsumexp of the map if it is asked for."""
        batch, prefix = q.shape[0], grid.prefix
        maps = [tokens[:, prefix:].reshape(batch, *grid.shape, *tokens.shape[2:]) for tokens in (q, k, v)]
        found = neighborhood_attention(
            *maps,
            window=self.window,
            stride=self.stride,
            dilation=self.dilation,
            is_causal=self.is_causal,
            scale=self.scale,
            bias=self._bias(),
            extra_keys=k[:, :prefix] if prefix else None,
            extra_values=v[:, :prefix] if prefix else None,
            return_lse=with_lse,
            implementation=self.implementation,
        )
        out, lse = found if with_lse else (found, None)
        heads = out.reshape(batch, grid.places, *out.shape[-2:])
        if prefix:
            heads = jnp.concatenate([dense_attention(q[:, :prefix], k, v, scale=self.scale), heads], axis=1)
        return heads, lse

    def _as_mask(self, grid: Grid, mask: Array | None) -> tuple[Array, Array | None]:
        """The pattern as mask and bias of dense attention."""
        pattern = make_pattern(
            grid.shape, self.window, stride=self.stride, dilation=self.dilation, is_causal=self.is_causal
        )
        prefix = ((grid.prefix, 0), (grid.prefix, 0))
        allowed = jnp.asarray(np.pad(pattern.mask(), prefix, constant_values=True))[None, None]
        allowed = allowed if mask is None else mask & allowed
        if (table := self._bias()) is None:
            return allowed, None
        # The table on members of dilation groups, as one on places: what lies outside the window is masked.
        spread = _spread(table, grid.shape, self.window, self.dilation)
        return allowed, jnp.pad(relative_position_bias(spread, grid.shape), ((0, 0), *prefix))[None]

    def _bias(self) -> Float[Array, "H *R"] | None:
        return None if self.relative_bias is None else sharding.gathered(self.relative_bias, jnp.float32)


def _spread(
    table: Float[Array, "H *R"], shape: Sequence[int], window: Sequence[int], dilation: Sequence[int]
) -> Float[Array, "H *R2"]:
    """A table over members of dilation groups as one over places; what no pair in a window has is anything."""
    for axis, (n, w, d) in enumerate(zip(shape, window, dilation, strict=True), start=1):
        displacement = np.arange(1 - n, n)
        member = np.clip(displacement // d + w - 1, 0, 2 * w - 2)
        table = jnp.take(table, member, axis=axis)
    return table
