"""What BiFormer (arXiv:2303.08810, official code) has in the place of bi-level routing: dense attention beside a
depthwise convolution, and convolutions alone.
"""

from typing import Any

from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from attn import Grid, Hook, dense_attention
from models.convolution import Conv
from models.init import scheme
from models.layers import DType, Linear, project_qkv
from models.names import unknown_name

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


class ConvolutionMixer(nnx.Module):
    """A linear layer, a depthwise convolution and a linear layer; no attention at all (BiFormer's `topk=0`).

    `heads` are accepted, as by every mechanism, and do nothing. There are no hook sites.

    Args:
      size: side of the depthwise kernel.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        size: int = 5,
        proj_bias: bool = True,
        init: str = "timm",
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        start = scheme(init)
        shared = {"dtype": dtype, "rngs": rngs}
        self.fc1 = Linear(width, width, use_bias=proj_bias, kernel_init=start.linear, split="out", **shared)
        self.conv = Conv(width, width, size=size, groups=width, kernel_init=start.patch, **shared)
        self.fc2 = Linear(width, width, use_bias=proj_bias, kernel_init=start.linear, split="in", **shared)

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
        """ValueError for prefix tokens and for a grid of other than two axes. The rest of the arguments do nothing."""
        _check_map(grid)
        y = self.fc1(x)
        return self.fc2(self.conv(y.reshape(y.shape[0], *grid.shape, -1)).reshape(y.shape))


def _check_map(grid: Grid) -> None:
    if grid.prefix or len(grid.shape) != 2:
        raise ValueError(
            f"a convolution needs a map of two axes without prefix tokens; given {grid.shape} and {grid.prefix} of them"
        )
