"""Attention modules by name. Any of them can stand in for any other in a block.

A module is made as `make_attention(name, width, heads, ...)` and called as
`module(x, grid, *, context=None, mask=None, hook=None, layer=None, train=False, key=None) -> x`.
`docs/model_interface.md` shows how to add one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from attn import Grid, Hook, dense_attention
from attn.relative import relative_position_bias, resample_relative_bias
from models import partition
from models.biformer_attention import ConvolutionMixer, LocalDenseAttention
from models.bilevel_routing import BiLevelRoutingAttention
from models.davit_attention import ChannelAttention
from models.halonet_attention import BottleneckAttention, HaloAttention
from models.init import scheme
from models.layers import DType, LayerNorm, Linear, RMSNorm, project_qkv, relative_bias_table
from models.names import keyword_options, unknown_name
from models.neighborhood import NeighborhoodAttention
from models.outlook import OutlookAttention
from models.window import WindowAttention


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
        table = partition.gathered(self.relative_bias, jnp.float32)
        extents = [2 * n - 1 for n in grid.shape]
        if list(table.shape[1:]) != extents:
            table = jnp.asarray(resample_relative_bias(table, extents))
        bias = relative_position_bias(table, grid.shape)
        return jnp.pad(bias, ((0, 0), (grid.prefix, 0), (grid.prefix, 0)))[None]


class IdentityAttention(nnx.Module):
    """Mixes no tokens: value and output projection only. The control for "does attention do anything here?"."""

    def __init__(
        self, width: int, heads: int, *, qkv_bias: bool = True, init: str = "timm", dtype: DType = None, rngs: nnx.Rngs
    ):
        self.heads = heads
        start = scheme(init)
        shared = {"kernel_init": start.linear, "units": (heads, "heads"), "dtype": dtype, "rngs": rngs}
        self.value = Linear(width, width, use_bias=qkv_bias, split="out", **shared)
        self.proj = Linear(width, width, split="in", **shared)

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
        """Each token sees itself only, whatever `context` and `mask` say. Hook sites: `"v"`, `"heads"`."""
        v = self.value(x).reshape(*x.shape[:2], self.heads, -1)
        if hook is not None:
            v = hook("heads", hook("v", v, layer), layer)
        return self.proj(v.reshape(x.shape))


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


ATTENTION: dict[str, Callable[..., nnx.Module]] = {
    "dense": DenseAttention,
    "identity": IdentityAttention,
    "differential": DifferentialAttention,
    "neighborhood": NeighborhoodAttention,
    "bilevel_routing": BiLevelRoutingAttention,
    "local_dense": LocalDenseAttention,
    "convolution": ConvolutionMixer,
    "outlook": OutlookAttention,
    "window": WindowAttention,
    "shifted_window": partial(WindowAttention, shift="half"),
    "grid": partial(WindowAttention, grid=True),
    "channel": ChannelAttention,
    "halo": HaloAttention,
    "bottleneck": BottleneckAttention,
}
"""Name -> module. A mechanism is added here and is then a value of the config key `model.attention`."""


def make_attention(
    name: str, width: int, heads: int, *, shared: dict[str, Any], options: dict[str, Any] | None = None, rngs: nnx.Rngs
) -> nnx.Module:
    """The named attention module.

    Args:
      shared: what the model says to every mechanism (`qkv_bias`, `init` ...); a mechanism takes what it has a use for.
      options: what the user says to this one; an option it does not have is a ValueError.
    """
    if name not in ATTENTION:
        raise ValueError(unknown_name("attention", name, ATTENTION))
    accepted = keyword_options(ATTENTION[name])
    for option in options or {}:
        if option not in accepted:
            raise ValueError(unknown_name(f"option of attention {name!r}", option, accepted))
    arguments = {option: value for option, value in shared.items() if option in accepted} | (options or {})
    return ATTENTION[name](width, heads, **arguments, rngs=rngs)
