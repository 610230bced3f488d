"""MaxViT: convolutions, attention within blocks, and attention over grids, in every layer (arXiv:2204.01697).

Variants are in `models/families/maxvit/variants.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from attn import Grid
from models.core.call import Call
from models.core.errors import unknown_name
from models.core.init import scheme
from models.core.options import Count, Flag, Pair, Positive, check_choices, check_stages, pair
from models.core.tap import TOKENS
from models.families.maxvit.block import MaxViTBlock, StridedMaxViTBlock
from models.hosts.block import BlockOptions
from models.hosts.hierarchy import Hierarchy, HierarchyOptions, Stage, stack_stages
from models.hosts.options import WINDOWED, windowed
from models.layers.linear import Head, Linear
from models.layers.mbconv import MBConvOptions
from models.layers.norm import LayerNorm
from models.layers.pool import GLOBAL_POOLS
from models.layers.stem import MaxViTStem

POOLS = ("avg", "max", "avgmax")
RATIO = 32
"""Side of an image over that of its windows, unless given: that of the last stage's map."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaxViTOptions(HierarchyOptions):
    """Options of `MaxViT`, besides those of every hierarchy.

    Attributes:
      widths: channels of the stages.
      head_width: channels of an attention head.
      layer_scale: initial value, of attentions and MLPs; None for no layer scale.
      stem_widths: channels of the stem's two convolutions; a number for both. stem_bias: of their convolutions.
      window: rows and columns of a block; a 32nd of `image_size` unless given.
      grid_window: places of a grid along each axis; as many as in a block unless given.
      image_size: which `window` follows from; images of another size need maps that the windows divide.
      mlp_ratio: hidden units of the MLPs over channels.
      pre_logits: units of a dense layer and tanh between pooling and head. With it the final norm acts after pooling;
        with None, which leaves it out, the norm acts before.
      pool: `"avg"`, `"max"` or `"avgmax"` (mean of both).
      convolution: options of `models.layers.mbconv.MBConvOptions`, which the stem shares.
      attention: of both attentions of a layer.
      block_attention: False leaves out the first of the two with its MLP.
      proj_bias: of the attention's output projections.
      norm_eps: of layer norms; that of batch norms is in `convolution`.
      drop_path: layer i of n has the rate `drop_path * i / n` in each of its five residual branches.
      init: `"normal"` is the official one.
    """

    widths: Sequence[Count]
    head_width: Count = 32
    stem_widths: Pair = 64
    stem_bias: Flag = True
    window: Pair | None = None
    grid_window: Pair | None = None
    mlp_ratio: Positive = 4.0
    pre_logits: Count | None = None
    pool: str = "avg"
    convolution: Mapping[str, Any] | None = None
    activation: str = "gelu_tanh"
    attention: str = "window"
    block_attention: Flag = True
    proj_bias: Flag = True
    layer_scale: float | None = None
    init: str = "normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(pool=(self.pool, POOLS))
        check_stages(widths=self.widths, depths=self.depths)
        if wrong := [width for width in self.widths if width % self.head_width]:
            raise ValueError(f"width {wrong[0]} is not divisible by heads of {self.head_width} channels")
        known = [field.name for field in dataclasses.fields(MBConvOptions)]
        for option in self.convolution or {}:
            if option not in known:
                raise ValueError(unknown_name("option of convolution", option, known))
        self.windows()

    def windows(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of a block, and those of a grid. ValueError where there are none."""
        sides = pair(self.image_size)
        block = (sides[0] // RATIO, sides[1] // RATIO) if self.window is None else pair(self.window)
        if min(block) < 1:
            raise ValueError(
                f"window={self.window!r} for images of {self.image_size}: must be at least 1 along each axis"
            )
        return block, block if self.grid_window is None else pair(self.grid_window)

    def for_mechanisms(self) -> Mapping[str, tuple[str, ...]]:
        """Windows are for attention that has some."""
        return {"window": WINDOWED, "grid_window": WINDOWED}


class MaxViT(Hierarchy):
    """Stem to half of the sides, stages that begin with a layer of stride 2, pooling, norm, dense layer, tanh, head."""

    Options = MaxViTOptions
    options: MaxViTOptions
    bias_resample = "bilinear"
    """How tables of bias by relative position become those of another window: `tf.image.resize`, as officially."""

    def __init__(self, options: MaxViTOptions, *, rngs: nnx.Rngs):
        o = self.options = options
        start = scheme(o.init)
        # The base class drops after the stem, where these models do not.
        self.dropout, self.head_dropout, self.drop_path = 0.0, o.head_dropout, o.drop_path
        self.dtype, self.num_classes = o.dtype, o.num_classes
        self.window, self.grid_window = o.windows()
        # Other mechanisms take any map, and so may this one with options of the user's.
        self.checks_maps = o.attention == "window" and not {"window", "padding"} & set(o.attention_options or ())

        stems = pair(o.stem_widths)
        self.convolution = convolution = MBConvOptions(**(o.convolution or {}))
        self.patch_embed = MaxViTStem(
            o.channels, stems, use_bias=o.stem_bias, options=convolution, init=o.init, dtype=o.dtype, rngs=rngs
        )
        makers, firsts, maps = [], [], stage_maps(o.image_size, len(o.depths))
        for stage, (before, width) in enumerate(zip([stems[-1], *o.widths[:-1]], o.widths, strict=True)):
            parts = (convolution, *self._attentions(width, Grid(maps[stage])))
            makers.append([partial(MaxViTBlock, width, *parts)])
            firsts.append(partial(StridedMaxViTBlock, before, *parts))
        made = [first(rngs) for first in firsts]
        stacks = stack_stages(makers, o.depths, rngs=rngs, scan=o.scan, remat=o.remat, own_first=True)
        self.stages = nnx.List([Stage(None, stack, first, o.remat) for stack, first in zip(stacks, made, strict=True)])
        last, shared = o.widths[-1], {"dtype": o.dtype, "rngs": rngs}
        self.norm = LayerNorm(last, eps=o.norm_eps, dtype=o.dtype)
        self.pre_logits = Linear(last, o.pre_logits, kernel_init=start.pre_logits, **shared) if o.pre_logits else None
        features = o.pre_logits or last
        self.head = Head(features, o.num_classes, kernel_init=start.head, **shared) if o.num_classes else None

    def _attentions(self, width: int, grid: Grid) -> tuple[BlockOptions | None, BlockOptions]:
        """Attention within blocks and over grids."""
        o = self.options
        options = BlockOptions.of(
            o,
            width=width,
            heads=width // o.head_width,
            mlp_width=int(width * o.mlp_ratio),
            mlp_bias=True,
            grid=grid,
        )

        def of(window: tuple[int, int], **partition: Any) -> BlockOptions:
            # Maps are never padded, officially.
            own = {"padding": False, **partition}
            defaults = windowed(window, window=own, grid={"padding": False}, shifted_window={"padding": False})
            return dataclasses.replace(options, attention_defaults=defaults)

        return of(self.window) if o.block_attention else None, of(self.grid_window, grid=True)

    def enter(self, stage: int, x: Float[Array, "B Y X C"], call: Call) -> Array:
        """Refuses images whose maps the windows do not divide, before the first of them is attended.

        Raises:
          ValueError: such an image; says which are allowed.
        """
        if stage == 0 and self.checks_maps:
            shape = x.shape[1:3]
            for number in range(len(self.stages)):
                shape = tuple(-(-side // 2) for side in shape)
                for window in {self.window, self.grid_window}:
                    if any(side % size for side, size in zip(shape, window, strict=True)):
                        raise ValueError(self._refusal(number, shape, window))
        return x

    def _refusal(self, stage: int, shape: Sequence[int], window: Sequence[int]) -> str:
        steps = np.lcm(self.window, self.grid_window) * 2 ** (1 + len(self.stages))
        return (
            f"stage {stage} has a map of {tuple(shape)}, which windows of {tuple(window)} do not divide; allowed: "
            f"images of a multiple of {steps[0]} x {steps[1]} pixels, or a model made with their image_size"
        )

    def drop_rates(self) -> np.ndarray:
        """The last layer's is less than `drop_path`: the official code divides by the number of layers."""
        return self.drop_path * np.arange(self.depth) / self.depth

    def pool(self, x: Float[Array, "B Y X C"], call: Call) -> tuple[Float[Array, "B N C"], Float[Array, "B D"]]:
        """Tokens of the last stage, and the pooled features, behind norm and dense layer."""
        tokens, pool = x.reshape(x.shape[0], -1, x.shape[-1]), GLOBAL_POOLS[self.options.pool]
        if self.pre_logits is None:
            tokens = call.emit("norm", self.norm(tokens), TOKENS)
            return tokens, pool(tokens)
        pooled = call.emit("norm", self.norm(pool(tokens)), "batch channels")
        return tokens, jnp.tanh(self.pre_logits(pooled))


def stage_maps(image_size: int | tuple[int, int], stages: int) -> list[tuple[int, int]]:
    """Rows and columns of the map of each stage: half of the image, then half of the map before, rounded up."""
    rows, columns = pair(image_size)
    return [(-(-rows // 2 ** (2 + stage)), -(-columns // 2 ** (2 + stage))) for stage in range(stages)]
