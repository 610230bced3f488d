"""Attention within windows of a map as a module, for Swin (arXiv:2103.14030), DaViT and MaxViT."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from attn import Grid, window_attention
from attn.common.windows import to_windows
from kernels.neighborhood.pattern import per_axis
from models.attention.mechanism import WINDOWS, Declaration, Entry, ProjectedMechanism, attended, check_divides
from models.core import sharding
from models.core.call import Call
from models.core.tap import TokenIndex
from models.layers.linear import DType
from models.layers.pad import cropped, padded
from models.layers.position import relative_bias_table

PerAxis = int | Sequence[int]


class WindowAttention(ProjectedMechanism):
    """Softmax attention among the places of each window; projections as in `DenseAttention`.

    A map that the windows do not divide is padded with zeros on the right and at the bottom before the projections,
    and cropped after the attention, as in timm's Swin and DaViT: the padding is keys like any others. A shifted map is
    rolled first and padded then, as in timm; `pad_first` has it the other way round (without padding they are the
    same).

    Args:
      window: rows and columns of a window; a number for both.
      grid: windows are grids spread over the map, not blocks of neighbouring places (MaxViT, arXiv:2204.01697).
      shift: rows and columns by which blocks begin later than the map does; `"half"` for half a window.
      relative_bias: a learned bias of each head by relative position, `[H, 2 rows - 1, 2 columns - 1]`.
      scale: of the logits; `head_width ** -0.5` unless given.
      head_width: channels of a head; `width / heads` unless given.
      padding: False makes a map that the windows do not divide an error.
      pad_first: a map is padded before it is shifted, as by Microsoft (in detection), Hugging Face and torchvision.
      dropout: on probabilities.
      implementation: see `attn.window_attention`.

    Maps are `[B, windows, H, N, N]`, windows of the shifted, padded map in row-major order; other sites are over its
    tokens.
    """

    declaration = Declaration(
        summary="softmax attention within windows of the map",
        paper="arXiv:2103.14030",
        operator="window_attention",
        cost="4 N C^2 + 2 N w^2 C for windows of w places a side",
    )

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
        pad_first: bool = False,
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
        if head_width is None:
            check_divides(width, heads)
        rows, columns = per_axis("window", window, 2, 1)
        self.window: tuple[int, int] = (rows, columns)
        self.shift = _shift(shift, self.window, grid)
        self.grid, self.padding, self.pad_first = grid, padding, pad_first
        self.scale, self.dropout, self.implementation = scale, dropout, implementation
        head_width = width // heads if head_width is None else head_width
        shared: dict[str, Any] = {"norm_eps": norm_eps, "init": init, "dtype": dtype, "rngs": rngs}
        self.make_inputs(width, heads, head_width, qkv_bias=qkv_bias, qk_norm=qk_norm, **shared)
        extents = (2 * rows - 1, 2 * columns - 1)
        self.relative_bias = relative_bias_table(heads, extents, rngs) if relative_bias else None
        self.make_output(heads * head_width, width, proj_bias=proj_bias, scale_norm=scale_norm, **shared)

    def refuse_map(self, grid: Grid) -> str | None:
        """A map that the windows do not divide, without padding."""
        if not self.padding and any(side % size for side, size in zip(grid.shape, self.window, strict=True)):
            return f"windows of {self.window} do not divide a map of {tuple(grid.shape)}; padding=True fills it up"
        return None

    def attend(self, x: Float[Array, "B N C"], call: Call) -> Float[Array, "B N C"]:
        """New tokens."""
        grid, larger = call.grid, self._larger(call.grid)
        bias = None if self.relative_bias is None else sharding.gathered(self.relative_bias, jnp.float32)

        def attend(q: Array, k: Array, v: Array, **options: Any) -> Any:
            q, k, v = (tokens.reshape(tokens.shape[0], *larger.shape, *tokens.shape[2:]) for tokens in (q, k, v))
            found = window_attention(
                q,
                k,
                v,
                window=self.window,
                grid=self.grid,
                shift=self.shift,
                bias=bias,
                scale=self.scale,
                implementation=self.implementation,
                **self.noise(call),
                **options,
            )
            parts = [x.reshape(x.shape[0], larger.places, *x.shape[3:]) for x in _several(found)]
            return tuple(parts) if options["return_lse"] else parts[0]

        index = self._index(grid, larger) if call.wants("logits", "probs") else None
        inputs = self.inputs(self._enlarged(x, grid, larger))
        heads = attended(call, attend, *inputs, axes=WINDOWS, index=index, whole=larger.places)
        return self.output(self._reduced(heads.reshape(*heads.shape[:2], -1), larger, grid))

    def _index(self, grid: Grid, larger: Grid) -> TokenIndex:
        with jax.ensure_compile_time_eval():
            # Counted from 1, so that what is padded, zero, is -1.
            numbers = jnp.arange(1.0, grid.places + 1).reshape(1, grid.places, 1)
            places = self._rolled(self._enlarged(numbers, grid, larger), larger, -1)
            windows = to_windows(places.reshape(1, *larger.shape, 1), self.window, grid=self.grid)
            tokens = np.asarray(windows)[..., 0].astype(int) - 1
        return TokenIndex(tokens, tokens, (grid, grid))

    def _larger(self, grid: Grid) -> Grid:
        """The map that the windows divide."""
        sides = (-(-side // size) * size for side, size in zip(grid.shape, self.window, strict=True))
        return Grid(tuple(sides)) if self.padding else grid

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
        if self.pad_first or not any(self.shift):
            return x
        down, right = self.shift
        return jnp.roll(x.reshape(x.shape[0], *grid.shape, -1), (sign * down, sign * right), (1, 2)).reshape(x.shape)

    def cost(self, grid: Grid) -> int:
        """The formula of the declaration, of the padded map."""
        larger = self._larger(grid)
        inputs = self.qkv.kernel.size * larger.places + self.proj.kernel.size * grid.places
        return inputs + 2 * larger.places * self.window[0] * self.window[1] * self.proj.kernel.shape[0]


def _several(found: Any) -> tuple[Any, ...]:
    return found if isinstance(found, tuple) else (found,)


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


_SHIFTED = "softmax attention within windows that begin half a window later than the map"
_GRID = "softmax attention within grids of places spread over the map"
MECHANISMS = (
    Entry("window", WindowAttention, WindowAttention.declaration),
    Entry(
        "shifted_window",
        partial(WindowAttention, shift="half"),
        dataclasses.replace(WindowAttention.declaration, summary=_SHIFTED),
    ),
    Entry(
        "grid",
        partial(WindowAttention, grid=True),
        dataclasses.replace(WindowAttention.declaration, summary=_GRID, paper="arXiv:2204.01697"),
    ),
)
