"""Transformer blocks by name. All are made and called alike, so a stack need not know which it holds."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from attn import Grid
from models.attention.mechanism import Mechanism
from models.attention.registry import checked_options, make_attention
from models.core import sharding
from models.core.call import Call
from models.core.tap import TOKENS
from models.layers.drop import drop_path, dropout
from models.layers.linear import DType
from models.layers.mlp import MLPS
from models.layers.norm import LayerNorm
from models.layers.scale import LayerScale


@dataclasses.dataclass(frozen=True)
class BlockOptions:
    """What a block is made of; the same for every kind of block.

    Attributes:
      attention: mechanism by name; attention_options: what the user says to it.
      attention_defaults: what the host says to mechanisms, by their names: `{"window": {"window": 7}}`.
      grid: that the block is made for; a mechanism that refuses it is an error.
      mlp_bias: of the MLP; as `proj_bias` unless given.
    """

    width: int
    heads: int
    mlp_width: int
    mlp: str = "mlp"
    activation: str = "gelu"
    attention: str = "dense"
    attention_options: Mapping[str, Any] | None = None
    attention_defaults: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    grid: Grid | None = None
    qkv_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool | None = None
    qk_norm: bool = False
    scale_attention_norm: bool = False
    scale_mlp_norm: bool = False
    layer_scale: float | None = None
    norm_eps: float = 1e-6
    dropout: float = 0.0
    attention_dropout: float = 0.0
    init: str = "timm"
    dtype: DType = None

    @classmethod
    def of(cls, options: Any, **own: Any) -> BlockOptions:
        """What a model's options say of its blocks, by the same names, and what is said here instead."""
        known = {field.name for field in dataclasses.fields(cls)}
        shared = {
            field.name: getattr(options, field.name) for field in dataclasses.fields(options) if field.name in known
        }
        return cls(**{**shared, **own})

    def make_attention(self, rngs: nnx.Rngs) -> Mechanism:
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
        }
        own = checked_options(self.attention, self.attention_options)
        options = {**self.attention_defaults.get(self.attention, {}), **own}
        return make_attention(
            self.attention, self.width, self.heads, shared=shared, options=options, grid=self.grid, rngs=rngs
        )

    def make_mlp(self, rngs: nnx.Rngs, *, input_bias: bool | None = None) -> nnx.Module:
        """The named feed-forward layer; its first layer has a bias as its last does, unless `input_bias` says."""
        bias = self.proj_bias if self.mlp_bias is None else self.mlp_bias
        return MLPS[self.mlp](
            self.width,
            self.mlp_width,
            activation=self.activation,
            bias=(bias if input_bias is None else input_bias, bias),
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


class Run:
    """One call of a block: how it calls its parts.

    Attributes:
      call: of the block.
      states: new states of the parts, in the order of their calls.
    """

    def __init__(self, block: Block, call: Call):
        self.block, self.call, self.states = block, call, list[Any]()
        self._branches = itertools.count()

    def attend(self, name: str, x: Float[Array, "B N C"], **changes: Any) -> Float[Array, "B M C"]:
        """The block's mechanism of that name, and dropout; the call is changed for it as is said here
        (`memory=None`)."""
        found = getattr(self.block, name)(x, self.call.at(name, **changes))
        y, *state = found if isinstance(found, tuple) else (found,)
        self.states += state
        key = self.call.key_for(f"{name}.dropout")
        return dropout(y, self.block.dropout, train=self.call.train, key=key)

    def feed(self, name: str, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        """The block's feed-forward layer of that name."""
        return getattr(self.block, name)(x, self.call.at(name))

    def drop(self, branch: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        """Drop path of a branch: each draws for itself."""
        key = self.call.key_for(f"drop_path{next(self._branches)}")
        return drop_path(branch, self.call.drop_path, train=self.call.train, key=key)


class Block(nnx.Module):
    """A residual block. A kind of block says what it is made of (`__init__`) and what it computes (`forward`)."""

    dropout: float

    def __call__(self, x: Float[Array, "B N C"], call: Call) -> Any:
        """The new tokens; with state in the call `(tokens, new state)`.

        Dropout and drop path need a key in training.
        """
        x, run = call.emit("block.in", x, TOKENS), Run(self, call)
        x = call.emit("block.out", sharding.over_batch(self.forward(x, run)), TOKENS)
        if call.state is None:
            return x
        if len(run.states) != 1:
            raise ValueError(f"{call.path}: a block with state has one mechanism that keeps it, not {len(run.states)}")
        return x, run.states[0]

    def forward(self, x: Float[Array, "B N C"], run: Run) -> Float[Array, "B N C"]:
        """The block in terms of `run.attend("attn", x)`, `run.feed("mlp", x)` and `run.drop(branch)`."""
        raise NotImplementedError


class PreNormBlock(Block):
    """`x += ls1(attn(norm1(x)))`, then `x += ls2(mlp(norm2(x)))` (arXiv:2010.11929)."""

    def __init__(self, options: BlockOptions, rngs: nnx.Rngs):
        self.dropout = options.dropout
        self.norm1, self.attn, self.ls1 = options.make_norm(), options.make_attention(rngs), options.make_layer_scale()
        self.norm2, self.mlp, self.ls2 = options.make_norm(), options.make_mlp(rngs), options.make_layer_scale()

    def forward(self, x, run):
        x = x + run.drop(self.ls1(run.attend("attn", self.norm1(x))))
        return x + run.drop(self.ls2(run.feed("mlp", self.norm2(x))))


class PostNormBlock(Block):
    """`x += norm1(attn(x))`, then `x += norm2(mlp(x))` (res-post-norm of Swin v2, arXiv:2111.09883).

    Layer scale is the initial scale of the norms, not a parameter of its own.
    """

    def __init__(self, options: BlockOptions, rngs: nnx.Rngs):
        self.dropout = options.dropout
        scale = 1.0 if options.layer_scale is None else options.layer_scale
        self.attn, self.norm1 = options.make_attention(rngs), options.make_norm(scale)
        self.mlp, self.norm2 = options.make_mlp(rngs), options.make_norm(scale)

    def forward(self, x, run):
        x = x + run.drop(self.norm1(run.attend("attn", x)))
        return x + run.drop(self.norm2(run.feed("mlp", x)))


class ParallelBlock(Block):
    """`x += ls(attn(norm(x)) + mlp(norm(x)))`, one norm for both (ViT-22B, arXiv:2302.05442)."""

    def __init__(self, options: BlockOptions, rngs: nnx.Rngs):
        self.dropout = options.dropout
        self.norm, self.attn = options.make_norm(), options.make_attention(rngs)
        self.mlp = options.make_mlp(rngs, input_bias=True)
        self.ls = options.make_layer_scale()

    def forward(self, x, run):
        y = self.norm(x)
        return x + run.drop(self.ls(run.attend("attn", y) + run.feed("mlp", y)))


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

    def forward(self, x, run):
        first = run.drop(self.attn1_ls(run.attend("attn1", self.attn1_norm(x))))
        x = x + first + run.drop(self.attn2_ls(run.attend("attn2", self.attn2_norm(x))))
        first = run.drop(self.mlp1_ls(run.feed("mlp1", self.mlp1_norm(x))))
        return x + first + run.drop(self.mlp2_ls(run.feed("mlp2", self.mlp2_norm(x))))


BLOCKS: dict[str, Callable[[BlockOptions, nnx.Rngs], Block]] = {
    "pre_norm": PreNormBlock,
    "post_norm": PostNormBlock,
    "parallel": ParallelBlock,
    "two_branch": TwoBranchBlock,
}
"""Name -> kind of block, made as `kind(options, rngs)`."""
