"""BiFormer: stages of bi-level routing attention, the last of dense attention (arXiv:2303.08810).

Variants are in `models/families/biformer/variants.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from attn import Grid
from attn.routed.region_pool import POOLS
from models.attention.bilevel_routing import ROUTINGS
from models.attention.local_dense import LOCAL_OF
from models.core.call import Call
from models.core.init import scheme
from models.core.options import Count, Flag, Positive, Size, check_choices, check_stages, each, pair
from models.core.tap import TOKENS
from models.families.biformer.block import BIFORMER_BLOCKS, LAYOUTS
from models.hosts.block import BlockOptions
from models.hosts.hierarchy import Hierarchy, Stage, StagesOptions, stack_stages
from models.hosts.options import options_for
from models.layers.linear import Head
from models.layers.norm import NORMS, normed

WITHOUT_BIAS = ("dense", "local_dense")
"""Mechanisms that have no bias of queries, keys and values in the published models."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BiFormerOptions(StagesOptions):
    """Options of `BiFormer`, besides those of every model of stages of blocks.

    Attributes:
      widths: channels by stage.
      mlp_ratio: hidden units of the MLP over channels, one number or one for each stage.
      attention: mechanism by name, one for all stages or one for each; by default `"bilevel_routing"` where `topk` is
        not 0, and `"local_dense"` where it is.
      attention_options: a dictionary, of which each stage's mechanism takes what it has, or one for each stage.
      regions: rows and columns of regions of a stage's map, or a number for both; a sequence of the stages' numbers.
      topk: regions that each region is routed to, by stage; 0 where a stage routes none.
      qk_widths: channels of queries and keys, by stage; those of the stage unless given.
      local: side of the depthwise kernel beside attention; 0 for none. local_of: what it convolves where attention is
        dense, see `models.attention.local_dense.LocalDenseAttention`.
      routing, pooling, scale, projection: see `models.attention.bilevel_routing.BiLevelRoutingAttention`. pool_sizes:
        by stage.
      auto_pad: a map that the regions do not divide is padded with zeros before the projections; without, it is an
        error. Sides that are multiples of 112 need none, with 7 regions in three stages.
      layout: stem and layers between stages, `"convolutions"`, or `"patches"` as in Swin (see
        `models.families.biformer.block`).
      norm, head_norm: of these layers, and before the mean: `"batch"` or `"layer"`.
      block: `"pre_norm"`, or `"norm_after"` with norms on the sums.
      positions: a depthwise convolution before every attention.
      mlp: `"mlp"`, or `"depthwise"` with a 3 x 3 convolution inside.
      qkv_bias: of bi-level routing; the dense attention of the published models has none.
      dropout: after the stem too.
      image_size: images may have any size that `auto_pad` allows.
    """

    widths: Sequence[Count]
    mlp_ratio: Positive | Sequence[Positive] = 3.0
    attention: str | Sequence[str] | None = None
    regions: Count | Sequence[Count | tuple[Count, Count]] = 7
    topk: Sequence[Size] = (1, 4, 16, 0)
    qk_widths: Sequence[Count] | None = None
    local: Size = 5
    local_of: str = "input"
    routing: str = "hard"
    pooling: str | None = None
    pool_sizes: Sequence[Count] | None = None
    scale: Positive | None = None
    projection: Flag = True
    auto_pad: Flag = False
    layout: str = "convolutions"
    norm: str = "batch"
    head_norm: str = "batch"
    positions: Flag = True
    norm_eps: Positive = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(
            layout=(self.layout, LAYOUTS),
            norm=(self.norm, NORMS),
            head_norm=(self.head_norm, NORMS),
            routing=(self.routing, ROUTINGS),
            local_of=(self.local_of, LOCAL_OF),
        )
        if self.pooling is not None:
            check_choices(pooling=(self.pooling, POOLS))
        check_stages(**self.by_stage())

    def check_attention_options(self) -> None:
        """Options of all stages, or of each."""
        options_for(self.by_stage()["attention"], self.attention_options)

    def blocks(self) -> Sequence[str]:
        """Names of the kinds of blocks that there are."""
        return tuple(BIFORMER_BLOCKS)

    def mlps(self) -> Sequence[str]:
        """Names of the feed-forward layers that there are."""
        return ("mlp", "depthwise")

    def by_stage(self) -> dict[str, Sequence[Any]]:
        """What differs from stage to stage; what is for routing only where a stage routes."""
        count = len(self.depths)
        chosen = ["bilevel_routing" if topk else "local_dense" for topk in self.topk]
        stages: dict[str, Sequence[Any]] = {
            "depths": self.depths,
            "widths": self.widths,
            "heads": self.heads,
            "mlp_ratio": each("mlp_ratio", self.mlp_ratio, count),
            "attention": chosen if self.attention is None else each("attention", self.attention, count),
        }
        if "bilevel_routing" in stages["attention"]:
            stages |= {
                "regions": each("regions", self.regions, count),
                "topk": self.topk,
                "qk_widths": self.widths if self.qk_widths is None else self.qk_widths,
                "pool_sizes": (1,) * count if self.pool_sizes is None else self.pool_sizes,
            }
        return stages

    def mechanisms(self) -> tuple[str, ...]:
        """Names of the mechanisms of the model, each once."""
        return tuple(dict.fromkeys(self.by_stage()["attention"]))

    def for_mechanisms(self) -> Mapping[str, tuple[str, ...]]:
        """Most is for routing."""
        routed = ("regions", "topk", "qk_widths", "routing", "pooling", "pool_sizes", "scale", "projection", "auto_pad")
        others = {"local": ("bilevel_routing", "local_dense"), "local_of": ("local_dense",)}
        return dict.fromkeys(routed, ("bilevel_routing",)) | others


class BiFormer(Hierarchy):
    """Stem to a quarter of the sides, stages of blocks with downsampling between them, batch norm, mean, head."""

    Options = BiFormerOptions
    options: BiFormerOptions

    def __init__(self, options: BiFormerOptions, *, rngs: nnx.Rngs):
        o = self.options = options
        self.dropout, self.head_dropout, self.drop_path = o.dropout, o.head_dropout, o.drop_path
        self.dtype, self.num_classes = o.dtype, o.num_classes
        common: dict[str, Any] = {"norm": o.norm, "init": o.init, "dtype": o.dtype, "rngs": rngs}
        stem, downsample = LAYOUTS[o.layout]
        self.patch_embed = stem(o.channels, o.widths[0], **common)
        stacks = stack_stages(self._makers(), o.depths, rngs=rngs, scan=o.scan, remat=o.remat)
        between = [None, *(downsample(*widths, **common) for widths in itertools.pairwise(o.widths))]
        self.stages = nnx.List([Stage(*parts) for parts in zip(between, stacks, strict=True)])
        self.norm = NORMS[o.head_norm](o.widths[-1], dtype=o.dtype)
        head = {"kernel_init": scheme(o.init).head, "dtype": o.dtype, "rngs": rngs}
        self.head = Head(o.widths[-1], o.num_classes, **head) if o.num_classes else None

    def _makers(self) -> list[list[Any]]:
        """The block of each stage."""
        o, stages = self.options, self.options.by_stage()
        said = options_for(stages["attention"], o.attention_options)
        make = partial(BIFORMER_BLOCKS[o.block], positions=o.positions, depthwise=o.mlp == "depthwise")
        rows, columns = pair(o.image_size)
        makers = []
        for stage, name in enumerate(stages["attention"]):
            own = {option: values[stage] for option, values in stages.items()}
            defaults: dict[str, Mapping[str, Any]] = {"local_dense": {"local": o.local, "local_of": o.local_of}}
            if name == "bilevel_routing":
                defaults[name] = {
                    "local": o.local,
                    "routing": o.routing,
                    "pooling": o.pooling,
                    "projection": o.projection,
                    "padding": "input" if o.auto_pad else None,
                    "regions": own["regions"],
                    "topk": own["topk"],
                    "qk_width": own["qk_widths"],
                    "pool_size": own["pool_sizes"],
                    "scale": o.scale,
                }
            blocks = BlockOptions.of(
                o,
                width=own["widths"],
                heads=own["heads"],
                mlp_width=int(own["mlp_ratio"] * own["widths"]),
                mlp="mlp",
                attention=name,
                attention_options=said[stage],
                attention_defaults=defaults,
                qkv_bias=o.qkv_bias and name not in WITHOUT_BIAS,
                grid=Grid((-(-rows // (4 * 2**stage)), -(-columns // (4 * 2**stage)))),
            )
            makers.append([partial(make, blocks)])
        return makers

    def pool(self, x: Float[Array, "B Y X C"], call: Call) -> tuple[Float[Array, "B N C"], Float[Array, "B C"]]:
        """Final tokens and the pooled features: norm of the map, then mean."""
        tokens = normed(self.norm, x, train=call.train).reshape(x.shape[0], -1, x.shape[-1])
        tokens = call.emit("norm", tokens, TOKENS)
        return tokens, tokens.mean(axis=1)
