"""Neighborhood Attention Transformer: NAT, DiNAT and DiNAT_s are options of one class.

Papers: arXiv:2204.07143 (NAT), 2209.15001 (DiNAT, DiNAT_s). Variants are in `models/families/nat/variants.py`.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

from flax import nnx

from models.core.errors import unknown_name
from models.core.init import scheme
from models.core.stack import shortest_cycle
from models.hosts.block import BLOCKS, BlockOptions
from models.hosts.hierarchy import Hierarchy, Stage, stack_stages
from models.layers.downsample import DOWNSAMPLERS
from models.layers.linear import DType, Linear
from models.layers.norm import LayerNorm
from models.layers.stem import STEMS

Dilations = str | Sequence[Sequence[int]] | None


class NeighborhoodTransformer(Hierarchy):
    """Stem to a quarter of the sides, stages of blocks with downsampling between them, norm, mean, head.

    Args:
      width: channels of the first stage; they double from stage to stage.
      depths, heads: layers, and attention heads of a layer, by stage.
      mlp_ratio: hidden units of the MLP over channels.
      window: side of the neighborhood; an odd number in all published models.
      dilations: for each stage the dilations of its layers, repeated as often as needed: `((1, 8), (1, 4), ...)`. None
        for no dilation; `"largest"` for 1 and, in every other layer, the largest whose window fits the stage's map at
        `image_size` (DiNAT, arXiv:2209.15001).
      image_size: side in pixels, or (height, width), which `dilations="largest"` are for; images may have any size.
      num_classes: 0 for no head; the model then returns pooled features.
      stem, downsample: see `models.layers.downsample`.
      stem_norm: a norm after the stem.
      block, mlp, activation, attention, attention_options, init: by name, as in
        `models.hosts.isotropic.VisionTransformer`. Window and dilation go to the mechanism that has a use for them.
      drop_path: rate of the last layer; layer i of n has `drop_path * i / (n - 1)`.
      dropout: after the stem, attention projection and both MLP layers. attention_dropout: on probabilities.
      layer_scale: initial value; None for no layer scale.
      scan: one leaf per parameter for all like layers of a stage, compiled once. remat: see `models.core.remat.REMAT`.
      dtype: of the computation, float32 unless given; parameters, norm statistics and softmax are float32.
    """

    def __init__(
        self,
        *,
        width: int,
        depths: Sequence[int],
        heads: Sequence[int],
        mlp_ratio: float = 3.0,
        window: int = 7,
        dilations: Dilations = None,
        image_size: int | tuple[int, int] = 224,
        num_classes: int = 1000,
        channels: int = 3,
        stem: str = "convolutions",
        stem_norm: bool = True,
        downsample: str = "convolution",
        block: str = "pre_norm",
        mlp: str = "mlp",
        activation: str = "gelu",
        attention: str = "neighborhood",
        attention_options: dict[str, Any] | None = None,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        norm_eps: float = 1e-5,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        init: str = "timm",
        scan: bool = True,
        remat: str = "none",
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        for option, value, allowed in (
            ("stem", stem, tuple(STEMS)),
            ("downsample", downsample, tuple(DOWNSAMPLERS)),
            ("block", block, tuple(BLOCKS)),
        ):
            if value not in allowed:
                raise ValueError(unknown_name(option, value, allowed))
        if len(depths) != len(heads):
            raise ValueError(f"depths={tuple(depths)} and heads={tuple(heads)}: one entry for each stage is needed")
        start = scheme(init)
        common = {"norm_eps": norm_eps, "init": init, "dtype": dtype, "rngs": rngs}
        self.dropout, self.drop_path, self.dtype, self.num_classes = dropout, drop_path, dtype, num_classes
        widths = [width * 2**stage for stage in range(len(depths))]

        self.patch_embed = STEMS[stem](channels, width, norm=stem_norm, **common)
        options = BlockOptions(
            width=width,
            heads=heads[0],
            mlp_width=int(width * mlp_ratio),
            mlp=mlp,
            activation=activation,
            attention=attention,
            attention_options=attention_options,
            qkv_bias=qkv_bias,
            layer_scale=layer_scale,
            norm_eps=norm_eps,
            dropout=dropout,
            attention_dropout=attention_dropout,
            init=init,
            dtype=dtype,
        )
        cycles = dilation_cycles(dilations, depths, window, image_size)
        makers = [
            [
                partial(
                    BLOCKS[block],
                    dataclasses.replace(
                        options,
                        width=channels_here,
                        heads=heads_here,
                        mlp_width=int(channels_here * mlp_ratio),
                        attention_defaults={"window": window, "dilation": dilation},
                    ),
                )
                for dilation in cycle
            ]
            for channels_here, heads_here, cycle in zip(widths, heads, cycles, strict=True)
        ]
        stacks = stack_stages(makers, depths, rngs=rngs, scan=scan, remat=remat)
        between = [None, *(DOWNSAMPLERS[downsample](before, 2 * before, **common) for before in widths[:-1])]
        self.stages = nnx.List([Stage(*parts) for parts in zip(between, stacks, strict=True)])
        self.norm = LayerNorm(widths[-1], eps=norm_eps, dtype=dtype)
        self.head = (
            Linear(widths[-1], num_classes, kernel_init=start.head, dtype=dtype, rngs=rngs) if num_classes else None
        )


def dilation_cycles(
    dilations: Dilations, depths: Sequence[int], window: int, image_size: int | tuple[int, int]
) -> list[tuple[int, ...]]:
    """For each stage the shortest run of dilations that its layers repeat.

    >>> dilation_cycles("largest", (3, 4, 18, 5), 7, 224)
    [(1, 8), (1, 4), (1, 2), (1,)]
    """
    if dilations is None:
        return [(1,)] * len(depths)
    if dilations == "largest":
        sides = [-(-side // 4) for side in ((image_size,) if isinstance(image_size, int) else image_size)]
        dilations = []
        for _ in depths:
            dilations.append((1, largest_dilation(sides, window)))
            sides = [-(-side // 2) for side in sides]
    if isinstance(dilations, str) or len(dilations) != len(depths):
        raise ValueError(
            f"dilations={dilations!r}; allowed: None, 'largest', or the dilations of each of the {len(depths)} stages"
        )
    return [
        shortest_cycle([stage[layer % len(stage)] for layer in range(depth)])
        for stage, depth in zip(dilations, depths, strict=True)
    ]


def largest_dilation(sides: Sequence[int], window: int) -> int:
    """The largest dilation with which a window fits a map; 1 for a map smaller than the window."""
    return max(1, min(sides) // window)
