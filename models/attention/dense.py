"""Dense attention as a module: every token sees all tokens."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from attn import Grid, Hook, dense_attention
from attn.common.relative import relative_position_bias, resample_relative_bias
from models.core import sharding
from models.core.init import scheme
from models.layers.linear import DType, Linear, project_qkv
from models.layers.norm import LayerNorm
from models.layers.position import relative_bias_table


class DenseAttention(nnx.Module):
    """Multi-head softmax attention over all tokens, projections fused as `[q, k, v]` (arXiv:2010.11929).

    Args:
      relative_bias: (rows, columns) of the grid that a learned bias of each head by relative position is for, as in
        Swin (arXiv:2103.14030, eq. 4) and ViT-rpb (arXiv:2209.15001); None for no bias. On another grid
        its table is resampled. Prefix tokens have none.
      scale: of the logits; `head width ** -0.5` unless given.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: bool = False,
        scale_norm: bool = False,
        relative_bias: tuple[int, int] | None = None,
        scale: float | None = None,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        init: str = "timm",
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.heads, self.dropout, self.scale = heads, dropout, scale
        start = scheme(init)
        split = {"units": (heads, "heads"), "dtype": dtype, "rngs": rngs}
        self.qkv = Linear(width, 3 * width, use_bias=qkv_bias, kernel_init=start.qkv, split="parts", **split)
        self.q_norm = LayerNorm(width // heads, eps=norm_eps, dtype=dtype) if qk_norm else None
        self.k_norm = LayerNorm(width // heads, eps=norm_eps, dtype=dtype) if qk_norm else None
        self.relative_bias = (
            None if relative_bias is None else relative_bias_table(heads, [2 * n - 1 for n in relative_bias], rngs)
        )
        self.norm = LayerNorm(width, eps=norm_eps, dtype=dtype) if scale_norm else None
        self.proj = Linear(width, width, use_bias=proj_bias, kernel_init=start.linear, split="in", **split)

    def __call__(
        self,
        x: Float[Array, "B N C"],
        grid: Grid,
        *,
        context: Float[Array, "B M C"] | None = None,
        mask: Bool[Array, "#B #H #N M"] | None = None,
        hook: Hook | None = None,
        layer: Any = None,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B N C"]:
        """Tokens attend to each other, or to `context` where it is given.

        `grid` matters to a relative bias only, which does not go with a context.
        """
        q, k, v = project_qkv(self.qkv, x, context, self.heads)
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        dropout = self.dropout if train else 0.0
        bias = self._bias(grid, context)
        heads = dense_attention(
            q, k, v, mask=mask, bias=bias, scale=self.scale, dropout=dropout, key=key, hook=hook, layer=layer
        )
        heads = heads.reshape(x.shape)
        return self.proj(heads if self.norm is None else self.norm(heads))

    def _bias(self, grid: Grid, context: Array | None) -> Float[Array, "1 H N N"] | None:
        if self.relative_bias is None:
            return None
        if context is not None:
            raise ValueError("a relative position bias has no meaning for a context: its tokens have no places")
        table = sharding.gathered(self.relative_bias, jnp.float32)
        extents = [2 * n - 1 for n in grid.shape]
        if list(table.shape[1:]) != extents:
            table = jnp.asarray(resample_relative_bias(table, extents))
        bias = relative_position_bias(table, grid.shape)
        return jnp.pad(bias, ((0, 0), (grid.prefix, 0), (grid.prefix, 0)))[None]
