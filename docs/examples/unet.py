"""A small U-Net for images with noise: it is told a time and a text, and keeps fine maps for its way back up.

model = UNet(UNetOptions(widths=(16, 32), text_width=12), rngs=nnx.Rngs(0))
noise = model(images, times, text)               # [B, Y, X, 3], [B], [B, M, 12] -> [B, Y, X, 3]
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attn import Grid
from models.core.call import Call, Memory
from models.core.init import scheme
from models.core.options import Count, Flag, Pair, Rate, check, pair
from models.core.stack import Stack
from models.core.tap import TOKENS
from models.core.watch import Watch
from models.hosts.block import Block, BlockOptions
from models.hosts.host import Host
from models.layers.conv import Conv
from models.layers.downsample import ConvDownsample
from models.layers.linear import DType, Linear
from models.layers.norm import LayerNorm

Images = Float[Array, "B Y X I"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetOptions:
    """Options of `UNet`.

    Attributes:
      image_size, channels: of the images, and of what it gives. widths: channels by level, the finest first.
      depth: blocks of each level, on each way.
      text_width, text_length: channels of the text's tokens, and how many there are.
      attention: mechanism of the map; the text has dense attention.
    """

    image_size: Pair = 16
    channels: Count = 3
    widths: Sequence[Count] = (32, 64)
    depth: Count = 2
    heads: Count = 4
    text_width: Count = 32
    text_length: Count = 8
    attention: str = "dense"
    dropout: Rate = 0.0
    init: str = "timm"
    scan: Flag = True
    dtype: DType = None

    def __post_init__(self) -> None:
        check(self)


class ConditionedBlock(Block):
    """Convolution, attention to the map, attention to the text, MLP; time moves and scales what the first two see."""

    def __init__(self, options: BlockOptions, text_width: int, condition: int, rngs: nnx.Rngs):
        self.dropout, width, start = options.dropout, options.width, scheme(options.init)
        shared = {"dtype": options.dtype, "rngs": rngs}
        self.conv = Conv(width, width, size=3, kernel_init=start.patch, **shared)
        self.time = Linear(condition, 4 * width, kernel_init=start.linear, **shared)
        self.norm1, self.norm2, self.norm3, self.norm4 = (options.make_norm() for _ in range(4))
        self.attn = options.make_attention(rngs)
        text = {"attention": "dense", "attention_options": {"memory_width": text_width}, "grid": None}
        self.cross = dataclasses.replace(options, **text).make_attention(rngs)
        self.mlp = options.make_mlp(rngs)

    def forward(self, x, run):
        told = jnp.split(self.time(run.call.condition)[:, None], 4, axis=-1)
        y = jax.nn.silu(self.norm1(x) * (1 + told[0]) + told[1]).reshape(x.shape[0], *run.call.grid.shape, -1)
        x = x + self.conv(y).reshape(x.shape)
        x = x + run.attend("attn", self.norm2(x) * (1 + told[2]) + told[3], memory=None)
        x = x + run.attend("cross", self.norm3(x))
        return x + run.feed("mlp", self.norm4(x))


class UNet(Host):
    """Down through the levels, and up again with the maps of the way down beside."""

    Options = UNetOptions

    def __init__(self, options: UNetOptions, *, rngs: nnx.Rngs):
        o = self.options = options
        start, shared = scheme(o.init), {"dtype": o.dtype, "rngs": rngs}
        first, pairs, levels = o.widths[0], list(itertools.pairwise(o.widths)), range(len(o.widths))
        self.stem = Conv(o.channels, first, size=3, kernel_init=start.patch, **shared)
        self.time = Linear(first, 4 * first, kernel_init=start.linear, **shared)
        self.down, self.up = (nnx.List([self._stack(way, level, rngs) for level in levels]) for way in ("down", "up"))
        self.coarser = nnx.List([ConvDownsample(*pair, norm_eps=1e-6, init=o.init, **shared) for pair in pairs])
        self.joined = nnx.List([Linear(sum(pair), pair[0], kernel_init=start.linear, **shared) for pair in pairs])
        self.norm = LayerNorm(first, dtype=o.dtype)
        self.head = Conv(first, o.channels, size=3, kernel_init=start.patch, **shared)

    def _stack(self, way: str, level: int, rngs: nnx.Rngs) -> Stack:
        o, width = self.options, self.options.widths[level]
        grid = Grid(tuple(-(-side // 2**level) for side in pair(o.image_size)))
        block = BlockOptions.of(o, width=width, mlp_width=4 * width, grid=grid)
        own = {"first": o.depth * (level if way == "down" else 2 * len(o.widths) - 1 - level), "scan": o.scan}
        make = partial(ConditionedBlock, block, o.text_width, 4 * o.widths[0])
        return Stack([make], o.depth, rngs=rngs, name=f"{way}.{level}", **own)

    @property
    def depth(self) -> int:
        """Blocks of both ways."""
        return 2 * self.options.depth * len(self.down)

    def inputs(self, batch: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of what the model is called with."""
        o = self.options
        of = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        return of((batch, *pair(o.image_size), o.channels)), of((batch,)), of((batch, o.text_length, o.text_width))

    def __call__(
        self, images: Images, times: Float[Array, " B"], text: Float[Array, "B M W"], *, train=False, key=None, tap=None
    ) -> Images:
        """What is noise in the images, float32."""
        return self.called("run", (images, times, text, key), tap, train=train)

    def run(self, images: Array, times: Array, text: Array, key: Any, watch: Watch | None, *, train: bool) -> Array:
        """One forward pass."""
        waves = times[:, None] * jnp.exp(-0.5 * jnp.arange(self.options.widths[0] // 2))
        condition = jax.nn.silu(self.time(jnp.concatenate([jnp.sin(waves), jnp.cos(waves)], -1)))
        call = Call(Grid(()), train, key, memory=Memory(text), condition=condition, tap=watch)

        def through(stack: Stack, x: Array) -> Array:
            own = call.replace(grid=Grid(x.shape[1:3]), layer=stack.first, key=call.key_for(stack.name))
            return stack(x.reshape(x.shape[0], -1, x.shape[-1]), own)[0].reshape(x.shape)

        x, kept = self.stem(images), list[Array]()
        x = call.emit("embedded", x.reshape(x.shape[0], -1, x.shape[-1]), TOKENS).reshape(x.shape)
        for level, stack in enumerate(self.down):
            x = through(stack, x if level == 0 else self.coarser[level - 1](x))
            kept.append(x)
        x = through(self.up[-1], x)
        for level, fine in reversed(list(enumerate(kept[:-1]))):
            x = jax.image.resize(x, (*fine.shape[:3], x.shape[-1]), "nearest")
            x = through(self.up[level], self.joined[level](jnp.concatenate([fine, x], -1)))
        return self.head(jax.nn.silu(self.norm(x))).astype(jnp.float32)
