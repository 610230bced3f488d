"""Swin Transformer: attention within windows, shifted by half a window in every other layer (arXiv:2103.14030).

Variants are in `models/families/swin/variants.py`.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from kernels.neighborhood.pattern import per_axis
from models.core.errors import unknown_name
from models.core.init import scheme
from models.hosts.block import BLOCKS, BlockOptions
from models.hosts.hierarchy import Hierarchy, Stage, stack_stages
from models.layers.downsample import PatchMerging
from models.layers.linear import DType, Linear
from models.layers.norm import LayerNorm
from models.layers.pool import GLOBAL_POOLS
from models.layers.stem import PatchStem

Window = int | Sequence[int | Sequence[int]]
Pair = tuple[int, int]


class SwinTransformer(Hierarchy):
    """Patches, stages of blocks with merging of neighbours between them, norm, pooling, head.

    Args:
      width: channels of the first stage; they double from stage to stage.
      depths, heads: layers, and attention heads of a layer, by stage.
      head_width: channels of a head, one number or one for each stage; `width / heads` unless given.
      mlp_ratio: hidden units of the MLP over channels, one number or one for each stage.
      window: side of a window, (rows, columns), or one of these for each stage; two numbers are rows and columns.
      shrink_windows: a window that the map of its stage, at `image_size`, is not larger than is that map, along each
        axis, and not shifted along it. Without this it is kept, shifted, and filled with zeros.
      image_size: side in pixels, or (height, width), which windows are made for; images may have any size, and windows
        stay as they are.
      patch_size: side in pixels, or (height, width).
      num_classes: 0 for no head; the model then returns pooled features.
      stem_norm: a norm after the patch embedding.
      pool: see `models.layers.pool.GLOBAL_POOLS`.
      block, mlp, activation, attention, attention_options, init: by name, as in
        `models.hosts.isotropic.VisionTransformer`. Window, shift and width of a head go to the mechanism that has a use
        for them.
      drop_path: rate of the last layer; layer i of n has `drop_path * i / (n - 1)`.
      dropout: after attention projection and both MLP layers. attention_dropout: on probabilities. head_dropout: before
        the head.
      layer_scale: initial value; None for no layer scale, as published.
      scan: one leaf per parameter for all like layers of a stage, compiled once. remat: see `models.core.remat.REMAT`.
      dtype: of the computation, float32 unless given; parameters, norm statistics and softmax are float32.
    """

    patch_embed: PatchStem

    def __init__(
        self,
        *,
        width: int,
        depths: Sequence[int],
        heads: Sequence[int],
        head_width: int | Sequence[int | None] | None = None,
        mlp_ratio: float | Sequence[float] = 4.0,
        window: Window = 7,
        shrink_windows: bool = True,
        image_size: int | Pair = 224,
        patch_size: int | Pair = 4,
        num_classes: int = 1000,
        channels: int = 3,
        stem_norm: bool = True,
        pool: str = "avg",
        block: str = "pre_norm",
        mlp: str = "mlp",
        activation: str = "gelu",
        attention: str = "window",
        attention_options: dict[str, Any] | None = None,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        norm_eps: float = 1e-5,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        head_dropout: float = 0.0,
        init: str = "timm",
        scan: bool = True,
        remat: str = "none",
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        for option, value, allowed in (("block", block, tuple(BLOCKS)), ("pool", pool, tuple(GLOBAL_POOLS))):
            if value not in allowed:
                raise ValueError(unknown_name(option, value, allowed))
        stages = len(depths)
        if stages != len(heads):
            raise ValueError(f"depths={tuple(depths)} and heads={tuple(heads)}: one entry for each stage is needed")
        widths = [width * 2**stage for stage in range(stages)]
        ratios, head_widths = _each("mlp_ratio", mlp_ratio, stages), _each("head_width", head_width, stages)
        patch = per_axis("patch_size", patch_size, 2, 1)
        sides = per_axis("image_size", image_size, 2, 1)
        maps = stage_maps((-(-sides[0] // patch[0]), -(-sides[1] // patch[1])), stages)
        windows = stage_windows(window, stages)
        start = scheme(init)
        common = {"norm_eps": norm_eps, "init": init, "dtype": dtype, "rngs": rngs}
        self.dropout, self.head_dropout, self.drop_path = 0.0, head_dropout, drop_path
        self.dtype, self.num_classes, self.global_pool = dtype, num_classes, pool

        self.patch_embed = PatchStem(channels, width, norm=stem_norm, patch=(patch[0], patch[1]), **common)
        makers = []
        for stage in range(stages):
            options = BlockOptions(
                width=widths[stage],
                heads=heads[stage],
                mlp_width=int(widths[stage] * ratios[stage]),
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
            here, shift = fitted(windows[stage], maps[stage]) if shrink_windows else _whole(windows[stage])
            shared = {"window": here, "head_width": head_widths[stage]}
            group = [shared | {"shift": by} for by in dict.fromkeys([(0, 0), shift])]
            replaced = [dataclasses.replace(options, attention_defaults=defaults) for defaults in group]
            makers.append([partial(BLOCKS[block], one) for one in replaced])
        stacks = stack_stages(makers, depths, rngs=rngs, scan=scan, remat=remat)
        between = [None, *(PatchMerging(before, 2 * before, **common) for before in widths[:-1])]
        self.stages = nnx.List([Stage(*parts) for parts in zip(between, stacks, strict=True)])
        self.norm = LayerNorm(widths[-1], eps=norm_eps, dtype=dtype)
        pooled = widths[-1] * (2 if pool == "catavgmax" else 1)
        self.head = Linear(pooled, num_classes, kernel_init=start.head, dtype=dtype, rngs=rngs) if num_classes else None

    def pool(self, x: Float[Array, "B Y X C"], *, train: bool) -> tuple[Float[Array, "B N C"], Float[Array, "B P"]]:
        """Norm, then the pooling by name."""
        tokens = self.norm(x.reshape(x.shape[0], -1, x.shape[-1]))
        return tokens, GLOBAL_POOLS[self.global_pool](tokens)


def stage_windows(window: Window, stages: int) -> list[Pair]:
    """Rows and columns of the windows of each stage. Two numbers are rows and columns of all, as in timm.

    >>> stage_windows((7, 14), 2)
    [(7, 14), (7, 14)]
    >>> stage_windows((14, 14, 7), 3)
    [(14, 14), (14, 14), (7, 7)]
    """
    pair = isinstance(window, int) or (len(window) == 2 and isinstance(window[0], int))
    each = [window] * stages if pair else list(window)  # type: ignore[arg-type]
    if len(each) != stages:
        raise ValueError(f"window={window!r}; allowed: a side, (rows, columns), or one of these for {stages} stages")
    return [(rows, columns) for rows, columns in (per_axis("window", one, 2, 1) for one in each)]


def stage_maps(shape: Pair, stages: int) -> list[Pair]:
    """Rows and columns of the map of each stage: every merging halves them, rounded up."""
    return [(-(-shape[0] // 2**stage), -(-shape[1] // 2**stage)) for stage in range(stages)]


def fitted(window: Pair, shape: Pair) -> tuple[Pair, Pair]:
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


def _whole(window: Pair) -> tuple[Pair, Pair]:
    return window, (window[0] // 2, window[1] // 2)


def _each(name: str, value: Any, stages: int) -> list[Any]:
    """One entry for each stage."""
    if isinstance(value, Sequence):
        if len(value) != stages:
            raise ValueError(f"{name}={value!r}: one entry for each of the {stages} stages is needed")
        return list(value)
    return [value] * stages
