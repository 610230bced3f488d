"""Class attention: the class token looks at all tokens, which stay (CaiT, arXiv:2103.17239, section 4)."""

from typing import Any

from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from attn import Grid, Hook, dense_attention
from models.core.init import scheme
from models.layers.linear import DType, Linear


class ClassAttention(nnx.Module):
    """Softmax attention of the first token to all tokens. Hook sites are those of `dense_attention`, with one query."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qkv_bias: bool = False,
        dropout: float = 0.0,
        init: str = "timm",
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.heads, self.dropout = heads, dropout
        start = scheme(init)
        shared = {"units": (heads, "heads"), "dtype": dtype, "rngs": rngs}
        self.q = Linear(width, width, use_bias=qkv_bias, kernel_init=start.linear, split="out", **shared)
        self.kv = Linear(width, 2 * width, use_bias=qkv_bias, kernel_init=start.qkv, split="parts", **shared)
        self.proj = Linear(width, width, kernel_init=start.linear, split="in", **shared)

    def __call__(
        self,
        x: Float[Array, "B N C"],
        grid: Grid,
        *,
        context: Array | None = None,
        mask: Bool[Array, "#B #H 1 N"] | None = None,
        hook: Hook | None = None,
        layer: Any = None,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B 1 C"]:
        """What is new for the class token. ValueError for a context: the tokens themselves are that."""
        if context is not None:
            raise ValueError("class attention has no context besides the tokens of the map")
        batch, _, width = x.shape
        q = self.q(x[:, :1]).reshape(batch, 1, self.heads, -1)
        fused = checkpoint_name(self.kv.parts(x, 2, self.heads), "attention_qkv")
        heads = dense_attention(
            q,
            fused[:, :, 0],
            fused[:, :, 1],
            mask=mask,
            dropout=self.dropout if train else 0.0,
            key=key,
            hook=hook,
            layer=layer,
        )
        return self.proj(heads.reshape(batch, 1, width))
