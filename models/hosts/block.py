"""Transformer blocks by name. All are made and called alike, so a stack need not know which it holds."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from attn import Grid, Hook
from models.attention.registry import make_attention
from models.core import sharding
from models.layers import drop as noise
from models.layers.linear import DType
from models.layers.mlp import MLPS
from models.layers.norm import LayerNorm
from models.layers.scale import LayerScale


@dataclasses.dataclass(frozen=True)
class BlockOptions:
    """What a block is made of; the same for every kind of block.

    `attention_defaults` are options that only some mechanisms have (a window), which go to one that has them, while
    `attention_options` are the user's, and an unknown one is an error.
    """

    width: int
    heads: int
    mlp_width: int
    mlp: str = "mlp"
    activation: str = "gelu"
    attention: str = "dense"
    attention_options: dict[str, Any] | None = None
    attention_defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    qkv_bias: bool = True
    proj_bias: bool = True
    qk_norm: bool = False
    scale_attention_norm: bool = False
    scale_mlp_norm: bool = False
    layer_scale: float | None = None
    norm_eps: float = 1e-6
    dropout: float = 0.0
    attention_dropout: float = 0.0
    init: str = "timm"
    dtype: DType = None

    def make_attention(self, rngs: nnx.Rngs) -> nnx.Module:
        """The named mechanism."""
        shared = {
            "qkv_bias": self.qkv_bias,
            "proj_bias": self.proj_bias,
            "qk_norm": self.qk_norm,
            "scale_norm": self.scale_attention_norm,
            "norm_eps": self.norm_eps,
            "dropout": self.attention_dropout,
            "init": self.init,
            "dtype": self.dtype,
            **self.attention_defaults,
        }
        options = self.attention_options
        return make_attention(self.attention, self.width, self.heads, shared=shared, options=options, rngs=rngs)

    def make_mlp(self, rngs: nnx.Rngs, *, input_bias: bool | None = None) -> nnx.Module:
        """The named feed-forward layer; its first layer has a bias as its last does, unless `input_bias` says."""
        return MLPS[self.mlp](
            self.width,
            self.mlp_width,
            activation=self.activation,
            bias=(self.proj_bias if input_bias is None else input_bias, self.proj_bias),
            scale_norm=self.norm_eps if self.scale_mlp_norm else None,
            dropout=self.dropout,
            init=self.init,
            dtype=self.dtype,
            rngs=rngs,
        )

    def make_norm(self, scale: float = 1.0) -> nnx.Module:
        """A LayerNorm that starts at `scale`."""
        return LayerNorm(self.width, eps=self.norm_eps, scale=scale, dtype=self.dtype)

    def make_layer_scale(self) -> Callable[[Array], Array]:
        """Layer scale, or a function that does nothing if it is off."""
        return _unscaled if self.layer_scale is None else LayerScale(self.width, self.layer_scale)


def _unscaled(x: Array) -> Array:
    return x


class Block(nnx.Module):
    """A residual block. A kind of block says what it is made of (`__init__`) and what it computes (`forward`)."""

    dropout: float

    def __call__(
        self,
        x: Float[Array, "B N C"],
        grid: Grid,
        *,
        drop_path: float | Array = 0.0,
        context: Float[Array, "B M C"] | None = None,
        mask: Bool[Array, "#B #H #N M"] | None = None,
        hook: Hook | None = None,
        layer: Any = None,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B N C"]:
        """The new tokens.

        Args:
          drop_path: probability that an example skips a residual branch; may be traced.
          context, mask, hook, layer: for the attention module.
          key: for dropout and drop path, needed in training if either is used.
        """
        keys = (noise.fold_key(key, number) for number in itertools.count())

        def attend(attn: Callable, y: Array) -> Array:
            y = attn(y, grid, context=context, mask=mask, hook=hook, layer=layer, train=train, key=next(keys))
            return noise.dropout(y, self.dropout, train=train, key=next(keys))

        def feed(mlp: Callable, y: Array) -> Array:
            return mlp(y, train=train, key=next(keys))

        def drop(y: Array) -> Array:
            return noise.drop_path(y, drop_path, train=train, key=next(keys))

        return sharding.over_batch(self.forward(x, attend, feed, drop))

    def forward(self, x: Array, attend: Callable, feed: Callable, drop: Callable) -> Array:
        """The block in terms of `attend(module, x)`, `feed(module, x)` and `drop(branch)`."""
        raise NotImplementedError


class PreNormBlock(Block):
    """`x += ls1(attn(norm1(x)))`, then `x += ls2(mlp(norm2(x)))` (arXiv:2010.11929)."""

    def __init__(self, options: BlockOptions, rngs: nnx.Rngs):
        self.dropout = options.dropout
        self.norm1, self.attn, self.ls1 = options.make_norm(), options.make_attention(rngs), options.make_layer_scale()
        self.norm2, self.mlp, self.ls2 = options.make_norm(), options.make_mlp(rngs), options.make_layer_scale()

    def forward(self, x, attend, feed, drop):
        x = x + drop(self.ls1(attend(self.attn, self.norm1(x))))
        return x + drop(self.ls2(feed(self.mlp, self.norm2(x))))


class PostNormBlock(Block):
    """`x += norm1(attn(x))`, then `x += norm2(mlp(x))` (res-post-norm of Swin v2, arXiv:2111.09883).

    Layer scale is the initial scale of the norms, not a parameter of its own.
    """

    def __init__(self, options: BlockOptions, rngs: nnx.Rngs):
        self.dropout = options.dropout
        scale = 1.0 if options.layer_scale is None else options.layer_scale
        self.attn, self.norm1 = options.make_attention(rngs), options.make_norm(scale)
        self.mlp, self.norm2 = options.make_mlp(rngs), options.make_norm(scale)

    def forward(self, x, attend, feed, drop):
        x = x + drop(self.norm1(attend(self.attn, x)))
        return x + drop(self.norm2(feed(self.mlp, x)))


class ParallelBlock(Block):
    """`x += ls(attn(norm(x)) + mlp(norm(x)))`, one norm for both (ViT-22B, arXiv:2302.05442)."""

    def __init__(self, options: BlockOptions, rngs: nnx.Rngs):
        self.dropout = options.dropout
        self.norm, self.attn = options.make_norm(), options.make_attention(rngs)
        self.mlp = options.make_mlp(rngs, input_bias=True)
        self.ls = options.make_layer_scale()

    def forward(self, x, attend, feed, drop):
        y = self.norm(x)
        return x + drop(self.ls(attend(self.attn, y) + feed(self.mlp, y)))


class TwoBranchBlock(Block):
    """Two attentions side by side, then two MLPs (Three Things, arXiv:2203.09795); each branch as in pre-norm."""

    def __init__(self, options: BlockOptions, rngs: nnx.Rngs):
        self.dropout = options.dropout
        self.attn1_norm, self.attn1 = options.make_norm(), options.make_attention(rngs)
        self.attn1_ls = options.make_layer_scale()
        self.attn2_norm, self.attn2 = options.make_norm(), options.make_attention(rngs)
        self.attn2_ls = options.make_layer_scale()
        self.mlp1_norm, self.mlp1 = options.make_norm(), options.make_mlp(rngs)
        self.mlp1_ls = options.make_layer_scale()
        self.mlp2_norm, self.mlp2 = options.make_norm(), options.make_mlp(rngs)
        self.mlp2_ls = options.make_layer_scale()

    def forward(self, x, attend, feed, drop):
        first = drop(self.attn1_ls(attend(self.attn1, self.attn1_norm(x))))
        x = x + first + drop(self.attn2_ls(attend(self.attn2, self.attn2_norm(x))))
        first = drop(self.mlp1_ls(feed(self.mlp1, self.mlp1_norm(x))))
        return x + first + drop(self.mlp2_ls(feed(self.mlp2, self.mlp2_norm(x))))


BLOCKS: dict[str, Callable[[BlockOptions, nnx.Rngs], Block]] = {
    "pre_norm": PreNormBlock,
    "post_norm": PostNormBlock,
    "parallel": ParallelBlock,
    "two_branch": TwoBranchBlock,
}
"""Name -> kind of block, made as `kind(options, rngs)`."""
