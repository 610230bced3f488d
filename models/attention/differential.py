"""Differential attention as a module (arXiv:2410.05258)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from attn import Grid, Hook, dense_attention
from models.core.init import scheme
from models.layers.linear import DType, Linear, project_qkv
from models.layers.norm import LayerNorm, RMSNorm


class DifferentialAttention(nnx.Module):
    """Difference of two softmax maps per head (Differential Transformer, arXiv:2410.05258, eq. 1-3), as in timm.

    `heads` counts pairs: queries and keys have `2 * heads` heads of half the width. `lambda_init` depends on the layer.
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
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        init: str = "timm",
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        if width % (2 * heads):
            raise ValueError(f"differential attention: width {width} is not divisible by twice the {heads} heads")
        self.heads, self.dropout = heads, dropout
        half = width // heads // 2
        start = scheme(init)
        split = {"units": (heads, "pairs of heads"), "dtype": dtype, "rngs": rngs}
        self.qkv = Linear(width, 3 * width, use_bias=qkv_bias, kernel_init=start.qkv, split="parts", **split)
        self.q_norm = LayerNorm(half, eps=norm_eps, dtype=dtype) if qk_norm else None
        self.k_norm = LayerNorm(half, eps=norm_eps, dtype=dtype) if qk_norm else None
        normal = jax.nn.initializers.normal(0.1)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nnx.Param(normal(rngs.params(), (half,), jnp.float32)) for _ in range(4)
        )
        self.sub_norm = RMSNorm(2 * half, eps=1e-5, dtype=dtype)
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
        """As `DenseAttention`. At the hook sites the two maps of a pair are neighbouring heads, `2 * heads` in all."""
        batch, tokens, width = x.shape
        q, k, v = project_qkv(self.qkv, x, context, 2 * self.heads)
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        # Both maps of a pair weigh the same, twice as wide, values.
        v = jnp.repeat(v.reshape(batch, v.shape[1], self.heads, -1), 2, axis=2)
        dropout = self.dropout if train else 0.0
        both = dense_attention(q, k, v, mask=mask, dropout=dropout, key=key, hook=hook, layer=layer)
        both = both.reshape(batch, tokens, self.heads, 2, -1)

        lambda_init = 0.8 - 0.6 * jnp.exp(-0.3 * (0 if layer is None else layer))
        first = jnp.exp(jnp.sum(self.lambda_q1[...] * self.lambda_k1[...]))
        second = jnp.exp(jnp.sum(self.lambda_q2[...] * self.lambda_k2[...]))
        weight = (first - second + lambda_init).astype(x.dtype)
        heads = self.sub_norm(both[..., 0, :] - weight * both[..., 1, :]) * (1 - lambda_init).astype(x.dtype)
        heads = heads.reshape(batch, tokens, width)
        return self.proj(heads if self.norm is None else self.norm(heads))
