"""Swin Transformer: attention within windows, shifted by half a window in every other layer (arXiv:2103.14030).

Variants are in `models/families/swin/variants.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from attn import Grid
from models.core.call import Call
from models.core.init import scheme
from models.core.options import Count, Flag, Pair, Positive, check_choices, each, pair
from models.core.tap import TOKENS
from models.hosts.block import BLOCKS, BlockOptions
from models.hosts.hierarchy import Hierarchy, Stage, StagesOptions, stack_stages
from models.hosts.options import WINDOWED, windowed
from models.layers.downsample import PatchMerging
from models.layers.linear import Head
from models.layers.norm import LayerNorm
from models.layers.pool import GLOBAL_POOLS
from models.layers.stem import PatchStem

Sides = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwinOptions(StagesOptions):
    """Options of `SwinTransformer`, besides those of every model of stages of blocks.

    Attributes:
      width: channels of the first stage; they double from stage to stage.
      head_width: channels of a head, one number or one for each stage; `width / heads` unless given.
      mlp_ratio: hidden units of the MLP over channels, one number or one for each stage.
      window: side of a window, (rows, columns), or one of these for each stage; two numbers are rows and columns. One
        in `attention_options` stands for this one, and windows are shifted by half of it.
      shrink_windows: a window that the map of its stage, at `image_size`, is not larger than is that map, along each
        axis, and not shifted along it. Without this it is kept, shifted, and filled with zeros.
      pad_first: a map that the windows do not divide is filled with zeros before it is shifted, as by Hugging Face and
        torchvision, rather than after, as by timm; where nothing is filled they are the same.
      image_size: which windows are made for; images may have any size, and windows stay as they are.
      patch_size: side in pixels, or (height, width).
      stem_norm: a norm after the patch embedding.
      pool: see `models.layers.pool.GLOBAL_POOLS`.
    """

    width: Count
    head_width: Count | Sequence[Count | None] | None = None
    mlp_ratio: Positive | Sequence[Positive] = 4.0
    window: Count | Sequence[Count | tuple[Count, Count]] = 7
    shrink_windows: Flag = True
    pad_first: Flag = False
    patch_size: Pair = 4
    stem_norm: Flag = True
    pool: str = "avg"
    attention: str = "window"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(pool=(self.pool, GLOBAL_POOLS))
        stage_windows(self.window, len(self.depths))

    def for_mechanisms(self) -> Mapping[str, tuple[str, ...]]:
        """Windows are for attention that has some."""
        return {
            "window": WINDOWED,
            "shrink_windows": ("window",),
            "pad_first": ("window", "shifted_window"),
            "head_width": ("window", "shifted_window", "grid"),
        }


class SwinTransformer(Hierarchy):
    """Patches, stages of blocks with merging of neighbours between them, norm, pooling, head."""

    Options = SwinOptions
    options: SwinOptions
    patch_embed: PatchStem

    def __init__(self, options: SwinOptions, *, rngs: nnx.Rngs):
        o = self.options = options
        stages = len(o.depths)
        common = {"norm_eps": o.norm_eps, "init": o.init, "dtype": o.dtype, "rngs": rngs}
        self.dropout, self.head_dropout, self.drop_path = 0.0, o.head_dropout, o.drop_path
        self.dtype, self.num_classes = o.dtype, o.num_classes
        widths = [o.width * 2**stage for stage in range(stages)]
        self.patch_embed = PatchStem(o.channels, o.width, norm=o.stem_norm, patch=pair(o.patch_size), **common)

        stacks = stack_stages(self._makers(widths), o.depths, rngs=rngs, scan=o.scan, remat=o.remat)
        between = [None, *(PatchMerging(before, 2 * before, **common) for before in widths[:-1])]
        self.stages = nnx.List([Stage(*parts) for parts in zip(between, stacks, strict=True)])
        self.norm = LayerNorm(widths[-1], eps=o.norm_eps, dtype=o.dtype)
        pooled = widths[-1] * (2 if o.pool == "catavgmax" else 1)
        head = {"kernel_init": scheme(o.init).head, "dtype": o.dtype, "rngs": rngs}
        self.head = Head(pooled, o.num_classes, **head) if o.num_classes else None

    def _makers(self, widths: Sequence[int]) -> list[list[Any]]:
        """The blocks of each stage: not shifted, and shifted."""
        o, stages = self.options, len(widths)
        ratios, head_widths = each("mlp_ratio", o.mlp_ratio, stages), each("head_width", o.head_width, stages)
        own, window = o.attention_options, o.window
        if o.attention == "window" and "window" in (own or {}):
            # The user's window, of which the shift is half.
            window = own["window"]
            own = {name: value for name, value in own.items() if name != "window"}
        patch, sides = pair(o.patch_size), pair(o.image_size)
        maps = stage_maps((-(-sides[0] // patch[0]), -(-sides[1] // patch[1])), stages)
        makers = []
        for stage, (size, shape) in enumerate(zip(stage_windows(window, stages), maps, strict=True)):
            here, shift = fitted(size, shape) if o.shrink_windows else _whole(size)
            heads = {} if head_widths[stage] is None else {"head_width": head_widths[stage]}
            options = BlockOptions.of(
                o,
                width=widths[stage],
                heads=o.heads[stage],
                mlp_width=int(widths[stage] * ratios[stage]),
                attention_options=own,
                grid=Grid(shape),
            )
            order = {"pad_first": o.pad_first}
            others = windowed(size, shifted_window={**heads, **order}, grid=heads)
            group = [
                dataclasses.replace(
                    options, attention_defaults={**others, "window": {"window": here, "shift": by, **heads, **order}}
                )
                for by in dict.fromkeys([(0, 0), shift])
            ]
            makers.append([partial(BLOCKS[o.block], one) for one in group])
        return makers

    def pool(self, x: Float[Array, "B Y X C"], call: Call) -> tuple[Float[Array, "B N C"], Float[Array, "B P"]]:
        """Norm, then the pooling by name."""
        tokens = call.emit("norm", self.norm(x.reshape(x.shape[0], -1, x.shape[-1])), TOKENS)
        return tokens, GLOBAL_POOLS[self.options.pool](tokens)


def stage_windows(window: Any, stages: int) -> list[Sides]:
    """Rows and columns of the windows of each stage. Two numbers are rows and columns of all, as in timm.

    >>> stage_windows((7, 14), 2)
    [(7, 14), (7, 14)]
    >>> stage_windows((14, 14, 7), 3)
    [(14, 14), (14, 14), (7, 7)]

    ValueError for another number of entries.
    """
    both = isinstance(window, int) or (len(window) == 2 and isinstance(window[0], int))
    by_stage = [window] * stages if both else list(window)
    if len(by_stage) != stages:
        raise ValueError(f"window={window!r}; allowed: a side, (rows, columns), or one of these for {stages} stages")
    return [pair(one) for one in by_stage]


def stage_maps(shape: Sides, stages: int) -> list[Sides]:
    """Rows and columns of the map of each stage: every merging halves them, rounded up."""
    return [(-(-shape[0] // 2**stage), -(-shape[1] // 2**stage)) for stage in range(stages)]


def fitted(window: Sides, shape: Sides) -> tuple[Sides, Sides]:
    """(window, shift) on a map: where the map is not larger than the window there is one window and no shift.

    >>> fitted((7, 7), (7, 14))
    ((7, 7), (0, 3))
    """
    (rows, columns), (height, width) = window, shape
    # The shift is half of the window that was asked for; where it counts, that one is the window.
    return (min(rows, height), min(columns, width)), (
        rows // 2 if height > rows else 0,
        columns // 2 if width > columns else 0,
    )


def _whole(window: Sides) -> tuple[Sides, Sides]:
    return window, (window[0] // 2, window[1] // 2)
