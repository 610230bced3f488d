"""Dense attention beside a depthwise convolution (BiFormer, arXiv:2303.08810, official code)."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from attn import Grid, Hook, dense_attention
from models.attention.convolution import _check_map
from models.core.errors import unknown_name
from models.core.init import scheme
from models.layers.conv import Conv
from models.layers.linear import DType, Linear, project_qkv

LOCAL_OF = ("input", "values")


class LocalDenseAttention(nnx.Module):
    """Softmax attention over all tokens, plus a depthwise convolution, then the output projection.

    Args:
      local: side of the depthwise kernel; 0 for none.
      local_of: what it convolves: the `"input"` of the module, as in the last stage of the published models, or the
        `"values"`, as in the paper.
      scale: of the logits; `head width ** -0.5` unless given.

    Hook sites are those of `DenseAttention`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        local: int = 5,
        local_of: str = "input",
        scale: float | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        dropout: float = 0.0,
        init: str = "timm",
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        if local_of not in LOCAL_OF:
            raise ValueError(unknown_name("local_of", local_of, LOCAL_OF))
        self.heads, self.scale, self.dropout, self.local_of = heads, scale, dropout, local_of
        start = scheme(init)
        split = {"units": (heads, "heads"), "dtype": dtype, "rngs": rngs}
        self.qkv = Linear(width, 3 * width, use_bias=qkv_bias, kernel_init=start.qkv, split="parts", **split)
        self.local = (
            Conv(width, width, size=local, groups=width, kernel_init=start.patch, dtype=dtype, rngs=rngs)
            if local > 0
            else None
        )
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
        """ValueError for a context, for prefix tokens, and for a grid of other than two axes: none has neighbours."""
        if context is not None:
            raise ValueError("dense attention beside a convolution has no context, whose tokens have no neighbours")
        _check_map(grid)
        q, k, v = project_qkv(self.qkv, x, None, self.heads)
        dropout = self.dropout if train else 0.0
        heads = dense_attention(
            q, k, v, mask=mask, scale=self.scale, dropout=dropout, key=key, hook=hook, layer=layer
        ).reshape(x.shape)
        if self.local is not None:
            near = x if self.local_of == "input" else v
            heads = heads + self.local(near.reshape(x.shape[0], *grid.shape, -1)).reshape(x.shape)
        return self.proj(heads)
