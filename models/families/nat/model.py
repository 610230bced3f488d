"""Neighborhood Attention Transformer: NAT, DiNAT and DiNAT_s are options of one class.

Papers: arXiv:2204.07143 (NAT), 2209.15001 (DiNAT, DiNAT_s). Variants are in `models/families/nat/variants.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

from flax import nnx

from attn import Grid
from models.core.init import scheme
from models.core.options import Count, Flag, Positive, check_choices, pair
from models.core.stack import shortest_cycle
from models.hosts.block import BLOCKS, BlockOptions
from models.hosts.hierarchy import Hierarchy, Stage, StagesOptions, stack_stages
from models.hosts.options import WINDOWED, windowed
from models.layers.downsample import DOWNSAMPLERS
from models.layers.linear import Head
from models.layers.norm import LayerNorm
from models.layers.stem import STEMS


@dataclasses.dataclass(frozen=True, kw_only=True)
class NatOptions(StagesOptions):
    """Options of `NeighborhoodTransformer`, besides those of every model of stages of blocks.

    Attributes:
      width: channels of the first stage; they double from stage to stage.
      mlp_ratio: hidden units of the MLP over channels.
      window: side of the neighborhood (or of the windows of another mechanism that has some); an odd number in all
        published models.
      dilations: of neighborhood attention, for each stage those of its layers, repeated as often as needed:
        `((1, 8), (1, 4), ...)`. None for no dilation; `"largest"` for 1 and, in every other layer, the largest whose
        window fits the stage's map at `image_size` (DiNAT, arXiv:2209.15001).
      image_size: which `dilations="largest"` are for; images may have any size.
      stem, downsample: by name (`models.layers.stem.STEMS`, `models.layers.downsample.DOWNSAMPLERS`).
      stem_norm: a norm after the stem.
      dropout: after the stem too.
    """

    width: Count
    mlp_ratio: Positive = 3.0
    window: Count | tuple[Count, Count] = 7
    dilations: str | Sequence[Sequence[Count]] | None = None
    stem: str = "convolutions"
    stem_norm: Flag = True
    downsample: str = "convolution"
    attention: str = "neighborhood"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(stem=(self.stem, STEMS), downsample=(self.downsample, DOWNSAMPLERS))

    def for_mechanisms(self) -> Mapping[str, tuple[str, ...]]:
        """Windows and dilations are for attention that has some."""
        return {"window": WINDOWED, "dilations": ("neighborhood",)}


class NeighborhoodTransformer(Hierarchy):
    """Stem to a quarter of the sides, stages of blocks with downsampling between them, norm, mean, head."""

    Options = NatOptions

    def __init__(self, options: NatOptions, *, rngs: nnx.Rngs):
        o = self.options = options
        common = {"norm_eps": o.norm_eps, "init": o.init, "dtype": o.dtype, "rngs": rngs}
        self.dropout, self.drop_path, self.dtype, self.num_classes = o.dropout, o.drop_path, o.dtype, o.num_classes
        widths = [o.width * 2**stage for stage in range(len(o.depths))]
        self.patch_embed = STEMS[o.stem](o.channels, o.width, norm=o.stem_norm, **common)

        cycles = dilation_cycles(o.dilations, o.depths, o.window, o.image_size)
        maps = stage_maps(o.image_size, len(o.depths))
        makers = [
            [
                partial(
                    BLOCKS[o.block],
                    BlockOptions.of(
                        o,
                        width=width,
                        heads=heads,
                        mlp_width=int(width * o.mlp_ratio),
                        attention_defaults=windowed(o.window, neighborhood={"dilation": dilation}),
                        grid=Grid(sides),
                    ),
                )
                for dilation in cycle
            ]
            for width, heads, cycle, sides in zip(widths, o.heads, cycles, maps, strict=True)
        ]
        stacks = stack_stages(makers, o.depths, rngs=rngs, scan=o.scan, remat=o.remat)
        between = [None, *(DOWNSAMPLERS[o.downsample](before, 2 * before, **common) for before in widths[:-1])]
        self.stages = nnx.List([Stage(*parts) for parts in zip(between, stacks, strict=True)])
        self.norm = LayerNorm(widths[-1], eps=o.norm_eps, dtype=o.dtype)
        head = {"kernel_init": scheme(o.init).head, "dtype": o.dtype, "rngs": rngs}
        self.head = Head(widths[-1], o.num_classes, **head) if o.num_classes else None


def stage_maps(image_size: int | tuple[int, int], stages: int) -> list[tuple[int, int]]:
    """Rows and columns of the map of each stage: a quarter of the image, then half of the map before, rounded up."""
    rows, columns = pair(image_size)
    return [(-(-rows // (4 * 2**stage)), -(-columns // (4 * 2**stage))) for stage in range(stages)]


def dilation_cycles(
    dilations: str | Sequence[Sequence[int]] | None,
    depths: Sequence[int],
    window: int | tuple[int, int],
    image_size: int | tuple[int, int],
) -> list[tuple[int, ...]]:
    """For each stage the shortest run of dilations that its layers repeat.

    >>> dilation_cycles("largest", (3, 4, 18, 5), 7, 224)
    [(1, 8), (1, 4), (1, 2), (1,)]
    """
    if dilations is None:
        return [(1,)] * len(depths)
    if dilations == "largest":
        dilations = [(1, largest_dilation(sides, window)) for sides in stage_maps(image_size, len(depths))]
    if isinstance(dilations, str) or len(dilations) != len(depths) or not all(dilations):
        raise ValueError(
            f"dilations={dilations!r}; allowed: None, 'largest', or the dilations of each of the {len(depths)} stages"
        )
    return [
        shortest_cycle([stage[layer % len(stage)] for layer in range(depth)])
        for stage, depth in zip(dilations, depths, strict=True)
    ]


def largest_dilation(sides: Sequence[int], window: int | tuple[int, int]) -> int:
    """The largest dilation with which a window fits a map; 1 for a map smaller than the window."""
    return max(1, min(side // size for side, size in zip(sides, pair(window), strict=True)))
