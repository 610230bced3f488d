"""Attention between channels as a module (DaViT, arXiv:2204.03645)."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from attn import Grid, Hook
from attn.channel import channel_attention
from models.core.init import scheme
from models.layers.linear import DType, Linear, project_qkv

VERSIONS = (1, 2)


class ChannelAttention(nnx.Module):
    """Softmax attention between the channels of each group (section 3.3), projections as in `DenseAttention`.

    Args:
      heads: groups of channels.
      version: 1, DaViT's: the scale is `group width ** -0.5`, and the parts of the fused projection are values, queries
        and keys, which the published weights depend on. 2, Florence-2's (arXiv:2311.06242): the scale is
        `tokens ** -0.5`, and the parts are queries, keys and values.
      dropout: on probabilities.

    Hook sites are those of `attn.channel.channel_attention`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        version: int = 1,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        dropout: float = 0.0,
        init: str = "timm",
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} groups")
        if version not in VERSIONS:
            raise ValueError(f"version={version!r} of channel attention; allowed: {', '.join(map(str, VERSIONS))}")
        self.heads, self.version, self.dropout = heads, version, dropout
        start = scheme(init)
        split = {"units": (heads, "heads"), "dtype": dtype, "rngs": rngs}
        self.qkv = Linear(width, 3 * width, use_bias=qkv_bias, kernel_init=start.qkv, split="parts", **split)
        self.proj = Linear(width, width, use_bias=proj_bias, kernel_init=start.linear, split="in", **split)

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
        """New tokens; prefix tokens count like places.

        Raises:
          ValueError: a context or a mask: no token attends to another.
        """
        if context is not None or mask is not None:
            raise ValueError("channel attention has neither a context nor a mask: channels attend, tokens do not")
        parts = project_qkv(self.qkv, x, None, self.heads)
        if self.version == 1:
            (v, q, k), scale = parts, None
        else:
            (q, k, v), scale = parts, x.shape[1] ** -0.5
        heads = channel_attention(
            q, k, v, scale=scale, dropout=self.dropout if train else 0.0, key=key, hook=hook, layer=layer
        )
        return self.proj(heads.reshape(x.shape))
