"""Outlook attention as a module (VOLO, arXiv:2106.13112)."""

from typing import Any

import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from attn import Grid, outlook_attention
from attn.outlook import check_windows, outlook_centres
from models.attention.mechanism import KEYS, QUERIES, Declaration, Entry, Mechanism, check_divides
from models.core.call import Call
from models.core.init import scheme
from models.core.tap import TokenIndex
from models.layers.linear import DType, Linear


class OutlookAttention(Mechanism):
    """Every place of the grid is mixed with those around it, by weights that the centre of a window gives for the whole
    window (Yuan et al. 2021, section 3.1).

    Args:
      window: places along each axis, odd. stride: between windows.
      qkv_bias: of the values; there are no queries and keys, and the weights have a bias always.
      scale: of the logits; `head width ** -0.5` unless given.
      dropout: on probabilities.
      implementation: see `attn.outlook_attention`.

    Maps are `[B, windows, H, O, I]` over output places and input places of each window, in row-major order. `"lse"` is
    that of every window and output place.
    """

    declaration = Declaration(
        summary="every window is mixed by weights that its centre gives",
        paper="arXiv:2106.13112",
        operator="outlook_attention",
        cost="2 N C^2 + N / s^2 (w^4 H C + w^4 C) for windows of w places a side, s apart",
        sites=("v", "logits", "probs", "lse", "heads"),
    )

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        window: int = 3,
        stride: int = 2,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        scale: float | None = None,
        dropout: float = 0.0,
        implementation: str | None = None,
        init: str = "timm",
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        check_divides(width, heads)
        check_windows(window, stride)
        self.heads, self.window, self.stride, self.scale, self.dropout = heads, window, stride, scale, dropout
        self.implementation = implementation
        shared: dict[str, Any] = {"kernel_init": scheme(init).linear, "units": (heads, "heads")}
        shared |= {"dtype": dtype, "rngs": rngs}
        self.value = Linear(width, width, use_bias=qkv_bias, split="out", **shared)
        self.weights = Linear(width, heads * window**4, split="out", **shared)
        self.proj = Linear(width, width, use_bias=proj_bias, split="in", **shared)

    def attend(self, x: Float[Array, "B N C"], call: Call) -> Float[Array, "B N C"]:
        """New tokens."""
        shape, places = (x.shape[0], *call.grid.shape), self.window**2
        # Their means are of what the layers compute in.
        centres = outlook_centres(x.reshape(*shape, -1).astype(self.weights.dtype), stride=self.stride)
        logits = self.weights(centres).reshape(*centres.shape[:3], self.heads, places, places)
        v = checkpoint_name(self.value(x), "attention_qkv").reshape(*x.shape[:2], self.heads, -1)
        v = call.emit("v", v, KEYS)
        index = self._index(call.grid) if call.wants("logits", "probs") else None
        own = call.edit("batch windows heads queries keys", index)

        def edit(site: str, value: Array) -> Array:
            assert own is not None
            rows, columns = value.shape[1:3]
            return own(site, value.reshape(value.shape[0], rows * columns, *value.shape[3:])).reshape(value.shape)

        found = outlook_attention(
            logits,
            v.reshape(*shape, self.heads, -1),
            window=self.window,
            stride=self.stride,
            scale=self.scale,
            dropout=self.dropout if call.train else 0.0,
            key=call.key,
            edit=None if own is None else edit,
            return_lse=call.wants("lse"),
            implementation=self.implementation,
        )
        if call.wants("lse"):
            found, lse = found
            call.emit("lse", lse, "batch rows columns heads queries")
        heads = call.emit("heads", found.reshape(*x.shape[:2], self.heads, -1), QUERIES)
        return self.proj(heads.reshape(x.shape))

    def _index(self, grid: Grid) -> TokenIndex:
        """Places of every window; -1 outside the map."""
        height, width = grid.shape
        around = np.pad(np.arange(grid.places).reshape(height, width), self.window, constant_values=-1)
        reach = self.window - self.window // 2
        windows = [
            around[row + reach : row + reach + self.window, column + reach : column + reach + self.window].reshape(-1)
            for row in range(0, height, self.stride)
            for column in range(0, width, self.stride)
        ]
        return TokenIndex(np.stack(windows), np.stack(windows), (grid, grid))

    def cost(self, grid: Grid) -> int:
        """The formula of the declaration."""
        windows = np.prod([-(-side // self.stride) for side in grid.shape])
        inside = self.value.kernel.shape[-1] * self.window**4
        linear = grid.places * (self.value.kernel.size + self.proj.kernel.size)
        return int(linear + windows * (self.weights.kernel.size + inside))


MECHANISMS = (Entry("outlook", OutlookAttention, OutlookAttention.declaration),)
