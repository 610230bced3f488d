"""Attention within windows of a map as a module, for Swin (arXiv:2103.14030), DaViT and MaxViT."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from attn import Grid, Hook
from attn.window import window_attention
from kernels.neighborhood.pattern import per_axis
from models.core import sharding
from models.core.init import scheme
from models.layers.linear import DType, Linear, project_qkv
from models.layers.norm import LayerNorm
from models.layers.pad import cropped, padded
from models.layers.position import relative_bias_table

PerAxis = int | Sequence[int]


class WindowAttention(nnx.Module):
    """Softmax attention among the places of each window; projections as in `DenseAttention`.

    A map that the windows do not divide is padded with zeros on the right and at the bottom before the projections,
    and cropped after the attention, as in timm's Swin and DaViT: the padding is keys like any others. A shifted map is
    rolled first and padded then, as in timm (Microsoft's code for detection has it the other way round; without padding
    they are the same).

    Args:
      window: rows and columns of a window; a number for both.
      grid: windows are grids spread over the map, not blocks of neighbouring places (MaxViT, arXiv:2204.01697).
      shift: rows and columns by which blocks begin later than the map does; `"half"` for half a window.
      relative_bias: a learned bias of each head by relative position, `[H, 2 rows - 1, 2 columns - 1]`.
      scale: of the logits; `head_width ** -0.5` unless given.
      head_width: channels of a head; `width / heads` unless given.
      padding: False makes a map that the windows do not divide an error.
      dropout: on probabilities.
      implementation: see `attn.window.window_attention`.

    Hook sites are those of `DenseAttention`. There a window is an example, `[B * windows, N, H, D]`: all windows of the
    first example, then those of the next.
    """

    definition = "windows"
    """The implementation that multiplies what is needed and nothing else (`models/core/summary.py`)."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        window: PerAxis = 7,
        grid: bool = False,
        shift: PerAxis | str = 0,
        relative_bias: bool = True,
        scale: float | None = None,
        head_width: int | None = None,
        padding: bool = True,
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
        if head_width is None and width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        rows, columns = per_axis("window", window, 2, 1)
        self.window: tuple[int, int] = (rows, columns)
        self.shift = _shift(shift, self.window, grid)
        self.grid, self.padding = grid, padding
        self.heads, self.scale, self.dropout, self.implementation = heads, scale, dropout, implementation
        head_width = width // heads if head_width is None else head_width
        inside = heads * head_width
        start = scheme(init)
        split = {"units": (heads, "heads"), "dtype": dtype, "rngs": rngs}
        self.qkv = Linear(width, 3 * inside, use_bias=qkv_bias, kernel_init=start.qkv, split="parts", **split)
        self.q_norm = LayerNorm(head_width, eps=norm_eps, dtype=dtype) if qk_norm else None
        self.k_norm = LayerNorm(head_width, eps=norm_eps, dtype=dtype) if qk_norm else None
        extents = (2 * rows - 1, 2 * columns - 1)
        self.relative_bias = relative_bias_table(heads, extents, rngs) if relative_bias else None
        self.norm = LayerNorm(inside, eps=norm_eps, dtype=dtype) if scale_norm else None
        self.proj = Linear(inside, width, use_bias=proj_bias, kernel_init=start.linear, split="in", **split)

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
        """New tokens.

        Raises:
          ValueError: a context or prefix tokens, which have no place in a window; a mask; a map of other than two axes;
            a map that the windows do not divide, without `padding`.
        """
        if context is not None:
            raise ValueError("window attention has no context: its tokens would be in no window")
        if mask is not None:
            raise ValueError("window attention takes no mask: it is over all pairs of tokens, most of which never meet")
        if grid.prefix:
            raise ValueError(
                f"window attention has no place for {grid.prefix} prefix tokens (class token, registers): use average "
                "pooling and no registers"
            )
        if len(grid.shape) != 2:
            raise ValueError(f"a window of {self.window} does not fit a map of {grid.shape}: it needs two axes")
        larger = Grid(self._divisible(grid.shape))

        x = self._enlarged(x, grid, larger)
        q, k, v = project_qkv(self.qkv, x, None, self.heads)
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        bias = None if self.relative_bias is None else sharding.gathered(self.relative_bias, jnp.float32)
        heads = window_attention(
            *(tokens.reshape(tokens.shape[0], *larger.shape, *tokens.shape[2:]) for tokens in (q, k, v)),
            window=self.window,
            grid=self.grid,
            shift=self.shift,
            bias=bias,
            scale=self.scale,
            dropout=self.dropout if train else 0.0,
            key=key,
            hook=hook,
            layer=layer,
            implementation=self.implementation,
        )
        heads = self._reduced(heads.reshape(heads.shape[0], larger.places, -1), larger, grid)
        return self.proj(heads if self.norm is None else self.norm(heads))

    def _divisible(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Sides of the map that the windows divide."""
        if not self.padding:
            return shape
        return tuple(-(-side // size) * size for side, size in zip(shape, self.window, strict=True))

    def _enlarged(self, x: Float[Array, "B N C"], grid: Grid, larger: Grid) -> Float[Array, "B M C"]:
        """The padded map. The operator rolls what it is given: zeros go where they are last after that."""
        if larger == grid:
            return x
        return self._rolled(padded(self._rolled(x, grid, -1), grid, larger), larger, 1)

    def _reduced(self, x: Float[Array, "B M C"], larger: Grid, grid: Grid) -> Float[Array, "B N C"]:
        """Inverse of `_enlarged`."""
        if larger == grid:
            return x
        return self._rolled(cropped(self._rolled(x, larger, -1), larger, grid), grid, 1)

    def _rolled(self, x: Float[Array, "B N C"], grid: Grid, sign: int) -> Float[Array, "B N C"]:
        if not any(self.shift):
            return x
        down, right = self.shift
        return jnp.roll(x.reshape(x.shape[0], *grid.shape, -1), (sign * down, sign * right), (1, 2)).reshape(x.shape)


def _shift(shift: PerAxis | str, window: tuple[int, int], grid: bool) -> tuple[int, int]:
    """Rows and columns of a shift. ValueError for one of a window or more, and for a shifted grid."""
    if isinstance(shift, str) and shift != "half":
        raise ValueError(f"shift={shift!r}; allowed: 'half', a number of places, or one for each axis")
    half = (window[0] // 2, window[1] // 2)
    down, right = half if isinstance(shift, str) else per_axis("shift", shift, 2, 0)
    if down >= window[0] or right >= window[1]:
        raise ValueError(f"shift={shift!r} of windows of {window}; allowed: less than a window")
    if grid and (down or right):
        raise ValueError(f"shift={shift!r}: a grid cannot be shifted; allowed: 0")
    return down, right
