"""Outlook attention as a module (VOLO, arXiv:2106.13112)."""

from typing import Any

from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from attn import Grid, Hook
from attn.outlook.api import check_windows, outlook_attention, outlook_centres
from models.core.init import scheme
from models.layers.linear import DType, Linear


class OutlookAttention(nnx.Module):
    """Every place of the grid is mixed with those around it, by weights that the centre of a window gives for the whole
    window (Yuan et al. 2021, section 3.1).

    Args:
      window: places along each axis, odd. stride: between windows.
      qkv_bias: of the values; there are no queries and keys, and the weights have a bias always.
      scale: of the logits; `head width ** -0.5` unless given.
      dropout: on probabilities.

    Hook sites: `"v"` and `"heads"` as in `DenseAttention`, `"logits"` and `"probs"` `[B, V, U, H, O, I]` over windows,
    output places and input places (`attn.outlook_attention`).
    """

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
        init: str = "timm",
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        check_windows(window, stride)
        self.heads, self.window, self.stride, self.scale, self.dropout = heads, window, stride, scale, dropout
        shared = {"kernel_init": scheme(init).linear, "units": (heads, "heads"), "dtype": dtype, "rngs": rngs}
        self.value = Linear(width, width, use_bias=qkv_bias, split="out", **shared)
        self.weights = Linear(width, heads * window**4, split="out", **shared)
        self.proj = Linear(width, width, use_bias=proj_bias, split="in", **shared)

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
          ValueError: a context, prefix tokens or a mask, which outlook attention has no meaning for; a grid of other
            than two axes.
        """
        if context is not None or mask is not None or grid.prefix or len(grid.shape) != 2:
            raise ValueError(
                f"outlook attention is for maps of two axes, without context, mask or prefix tokens, not for {grid}"
            )
        shape = (x.shape[0], *grid.shape)
        centres = outlook_centres(x.reshape(*shape, -1), stride=self.stride)
        places = self.window**2
        logits = self.weights(centres).reshape(*centres.shape[:3], self.heads, places, places)
        v = checkpoint_name(self.value(x), "attention_qkv")
        heads = outlook_attention(
            logits,
            v.reshape(*shape, self.heads, -1),
            window=self.window,
            stride=self.stride,
            scale=self.scale,
            dropout=self.dropout if train else 0.0,
            key=key,
            hook=hook,
            layer=layer,
        )
        return self.proj(checkpoint_name(heads, "attention_heads").reshape(x.shape))
