"""A causal decoder: rotary positions, and a cache of keys and values that goes through the blocks as state.

model = Decoder(DecoderOptions(vocabulary=64, width=32, depth=2, heads=4), rngs=nnx.Rngs(0))
logits = model(tokens)                                 # [B, N, V], all tokens at once
logits, state = model(tokens[:, :5], state=model.empty(batch, 16))       # the same, in two pieces
logits, state = model(tokens[:, 5:6], state=state)
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from attn import Grid, causal
from models.attention import cache
from models.core.call import Call
from models.core.init import scheme
from models.core.options import Count, Flag, Positive, Rate, Size, check
from models.core.stack import Stack
from models.core.tap import TOKENS
from models.core.watch import Watch
from models.hosts.block import BlockOptions, PreNormBlock
from models.hosts.host import Host
from models.layers.linear import DType, Head
from models.layers.norm import LayerNorm
from models.layers.rotary import rotary_angles


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderOptions:
    """Options of `Decoder`.

    Attributes:
      vocabulary: how many tokens there are to choose from.
      length: of the sequences that it is made for; others are taken as well.
      mlp_ratio: hidden units of the MLPs over channels.
      attention: a mechanism that takes causal masks, on a grid of one axis. For a cache it has to keep state.
      dropout: after attention projections and both MLP layers.
      scan, remat, dtype: as in `models.hosts.options.ClassifierOptions`.
    """

    vocabulary: Count
    length: Size = 128
    width: Count = 64
    depth: Count = 2
    heads: Count = 4
    mlp_ratio: Positive = 4.0
    attention: str = "dense"
    attention_options: Any = None
    dropout: Rate = 0.0
    init: str = "timm"
    scan: Flag = True
    remat: str = "none"
    dtype: DType = None

    def __post_init__(self) -> None:
        check(self)


class Decoder(Host):
    """Embedding, blocks of causal attention, norm, logits of the next token."""

    Options = DecoderOptions

    def __init__(self, options: DecoderOptions, *, rngs: nnx.Rngs):
        o = self.options = options
        start, self.dtype = scheme(o.init), o.dtype
        self.embedding = nnx.Param(start.position(rngs.params(), (o.vocabulary, o.width), jnp.float32))
        block = BlockOptions.of(o, mlp_width=int(o.width * o.mlp_ratio), grid=Grid((o.length,)))
        self.blocks = Stack([partial(PreNormBlock, block)], o.depth, rngs=rngs, scan=o.scan, remat=o.remat)
        self.norm = LayerNorm(o.width, dtype=o.dtype)
        self.head = Head(o.width, o.vocabulary, kernel_init=start.head, dtype=o.dtype, rngs=rngs)

    @property
    def depth(self) -> int:
        """Layers of the model."""
        return self.options.depth

    def inputs(self, batch: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of what the model is called with."""
        return (jax.ShapeDtypeStruct((batch, self.options.length), jnp.int32),)

    def empty(self, batch: int, size: int) -> Any:
        """State before the first token: caches of all layers, each with room for `size` tokens."""
        o = self.options
        one = cache.empty(batch, size, o.heads, o.width // o.heads, o.dtype or jnp.float32)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (o.depth, *leaf.shape)), one)

    def __call__(
        self,
        tokens: Int[Array, "B N"],
        *,
        state: Any = None,
        train: bool = False,
        key: PRNGKeyArray | None = None,
        tap: Any = None,
    ) -> Any:
        """Logits `[B, N, V]`, float32; with the state of earlier tokens `(logits, new state)`."""
        return self.called("run", (tokens, state, key), tap, train=train)

    def run(self, tokens: Array, state: Any, key: Any, watch: Watch | None, *, train: bool) -> Any:
        """One forward pass."""
        o = self.options
        before = 0 if state is None else state["length"][0]
        angles = rotary_angles(before + jnp.arange(tokens.shape[1]), o.width // o.heads)
        mask, grid = causal(), Grid(tokens.shape[1:])
        call = Call(grid, train=train, key=key, mask=mask, positions=angles, state=state, tap=watch)
        x = self.embedding[...][tokens].astype(o.dtype or jnp.float32)
        found, _ = self.blocks(call.emit("embedded", x, TOKENS), call)
        x, state = (found, None) if state is None else found
        call = call.replace(layer=self.depth)
        x = call.emit("norm", self.norm(x), TOKENS)
        logits: Float[Array, "B N V"] = self.head(x)
        logits = call.emit("logits.out", logits, "batch tokens classes")
        return logits if state is None else (logits, state)
