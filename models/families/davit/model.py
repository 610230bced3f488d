"""DaViT: layers of attention between places and of attention between channels in turn (arXiv:2204.03645).

Variants are in `models/families/davit/variants.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from attn import Grid
from models.core.call import Call
from models.core.init import scheme
from models.core.options import Count, Flag, Positive, check_choices, check_stages, pair
from models.core.tap import TOKENS
from models.families.davit.block import PositionedBlock
from models.hosts.block import BlockOptions
from models.hosts.hierarchy import Hierarchy, HierarchyOptions, Stage, stack_stages
from models.hosts.options import WINDOWED, options_for, windowed
from models.layers.activation import ACTIVATIONS
from models.layers.downsample import NormedDownsample
from models.layers.linear import Head
from models.layers.norm import LayerNorm
from models.layers.pool import GLOBAL_POOLS
from models.layers.stem import OverlappingStem

DUAL = ("window", "channel")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DavitOptions(HierarchyOptions):
    """Options of `DualAttentionTransformer`, besides those of every hierarchy.

    Attributes:
      widths: channels by stage.
      depths: pairs of layers by stage: a stage has twice as many layers.
      heads: attention heads, and groups of channels, of a layer by stage.
      mlp_ratio: hidden units of the MLP over channels.
      window: side of a window, or (rows, columns); no bias by position.
      channel_version: of the attention between channels, see `models.attention.channel.ChannelAttention`.
      attention: mechanisms of the layers in turn, by name. One name is that of both layers of a pair.
      attention_options: a dictionary, of which each mechanism takes what it has, or one for each mechanism.
      feed_forward: blocks have an MLP.
      positions: blocks have their two depthwise convolutions for positions.
      position_activation: of these, by name; None for none.
      downsample_size: side of the kernel between stages, see `models.layers.downsample.NormedDownsample`.
      norm_first: the norm at the end acts on tokens and not on what is pooled.
      pool: see `models.layers.pool.GLOBAL_POOLS`; `"catavgmax"` needs `norm_first`.
      named_blocks: the layers of a pair have names in place of numbers in official weights (Florence-2's in timm).
      drop_path: rate of the last pair. Both layers of pair i of n have `drop_path * i / (n - 1)`, as in timm; the
        official code lets it grow from layer to layer.
    """

    widths: Sequence[Count]
    heads: Sequence[Count]
    mlp_ratio: Positive = 4.0
    window: Count | tuple[Count, Count] = 7
    channel_version: Count = 1
    attention: str | Sequence[str] = DUAL
    feed_forward: Flag = True
    positions: Flag = True
    position_activation: str | None = None
    downsample_size: Count = 2
    norm_first: Flag = False
    pool: str = "avg"
    named_blocks: Flag = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stages(widths=self.widths, depths=self.depths, heads=self.heads)
        check_choices(pool=(self.pool, [name for name in GLOBAL_POOLS if self.norm_first or name != "catavgmax"]))
        if self.position_activation is not None:
            check_choices(position_activation=(self.position_activation, ACTIVATIONS))
        if not self.attention:
            raise ValueError("attention=(): a stage without mechanisms has no layers")

    def check_attention_options(self) -> None:
        """Options of all, or of each."""
        options_for(self.members, self.attention_options)

    @property
    def members(self) -> tuple[str, ...]:
        """Mechanisms of the layers in turn."""
        return (self.attention,) * len(DUAL) if isinstance(self.attention, str) else tuple(self.attention)

    def for_mechanisms(self) -> Mapping[str, tuple[str, ...]]:
        """Windows and versions are for attention that has some."""
        return {"window": WINDOWED, "channel_version": ("channel",)}


class DualAttentionTransformer(Hierarchy):
    """Stem to a quarter of the sides, stages of pairs of blocks with downsampling between them, mean, norm, head."""

    Options = DavitOptions
    options: DavitOptions
    norm: LayerNorm

    def __init__(self, options: DavitOptions, *, rngs: nnx.Rngs):
        o = self.options = options
        common: dict[str, Any] = {"norm_eps": o.norm_eps, "init": o.init, "dtype": o.dtype, "rngs": rngs}
        self.dropout, self.head_dropout, self.drop_path = 0.0, o.head_dropout, o.drop_path
        self.dtype, self.num_classes = o.dtype, o.num_classes
        own = options_for(o.members, o.attention_options)
        make = partial(
            PositionedBlock,
            feed_forward=o.feed_forward,
            positions=o.positions,
            position_activation=o.position_activation,
        )

        self.patch_embed = OverlappingStem(o.channels, o.widths[0], **common)
        makers, sides = [], [-(-side // 4) for side in pair(o.image_size)]
        for width, heads in zip(o.widths, o.heads, strict=True):
            blocks = [
                BlockOptions.of(
                    o,
                    width=width,
                    heads=heads,
                    mlp_width=int(width * o.mlp_ratio),
                    attention=name,
                    attention_options=said,
                    attention_defaults={
                        **windowed(o.window, window={"relative_bias": False}),
                        "channel": {"version": o.channel_version},
                    },
                    grid=Grid(tuple(sides)),
                )
                for name, said in zip(o.members, own, strict=True)
            ]
            makers.append([partial(make, one) for one in blocks])
            sides = [-(-side // 2) for side in sides]
        layers = [len(o.members) * depth for depth in o.depths]
        stacks = stack_stages(makers, layers, rngs=rngs, scan=o.scan, remat=o.remat)
        between = [
            None,
            *(
                NormedDownsample(before, after, size=o.downsample_size, **common)
                for before, after in itertools.pairwise(o.widths)
            ),
        ]
        self.stages = nnx.List([Stage(*parts) for parts in zip(between, stacks, strict=True)])
        self.norm = LayerNorm(o.widths[-1], eps=o.norm_eps, dtype=o.dtype)
        pooled = o.widths[-1] * (2 if o.pool == "catavgmax" else 1)
        head = {"kernel_init": scheme(o.init).head, "dtype": o.dtype, "rngs": rngs}
        self.head = Head(pooled, o.num_classes, **head) if o.num_classes else None

    def drop_rates(self) -> np.ndarray:
        """The same rate for both layers of a pair."""
        members = len(self.options.members)
        return np.repeat(np.linspace(0.0, self.drop_path, self.depth // members), members)

    def pool(self, x: Float[Array, "B Y X C"], call: Call) -> tuple[Float[Array, "B N C"], Float[Array, "B P"]]:
        """Pooling, then the norm, or with `norm_first` the norm before."""
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        pool = GLOBAL_POOLS[self.options.pool]
        if self.options.norm_first:
            tokens = call.emit("norm", self.norm(tokens), TOKENS)
            return tokens, pool(tokens)
        return tokens, call.emit("norm", self.norm(pool(tokens)), "batch channels")
