"""MaxViT: convolutions, attention within blocks, and attention over grids, in every layer (arXiv:2204.01697).

Variants are in `models/families/maxvit/variants.py`.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from models.core.errors import unknown_name
from models.core.init import scheme
from models.families.maxvit.block import MaxViTBlock, StridedMaxViTBlock
from models.hosts.block import BlockOptions
from models.hosts.hierarchy import Hierarchy, Stage, stack_stages
from models.layers.linear import DType, Linear
from models.layers.mbconv import MBConvOptions
from models.layers.norm import LayerNorm
from models.layers.pool import GLOBAL_POOLS
from models.layers.stem import MaxViTStem

PerAxis = int | Sequence[int]
POOLS = ("avg", "max", "avgmax")
RATIO = 32
"""Side of an image over that of its windows, unless given: that of the last stage's map."""


class MaxViT(Hierarchy):
    """Stem to half of the sides, stages that begin with a layer of stride 2, pooling, norm, dense layer, tanh, head.

    Args:
      widths, depths: channels and layers of the stages.
      stem_widths: channels of the stem's two convolutions; a number for both.
      head_width: channels of an attention head.
      window: rows and columns of a block; a 32nd of `image_size` unless given.
      grid_window: places of a grid along each axis; as many as in a block unless given.
      image_size: side in pixels, or (height, width), that `window` follows from; images of another size need maps that
        the windows divide.
      num_classes: 0 for no head; the model then returns pooled features.
      mlp_ratio: hidden units of the MLPs over channels.
      pre_logits: units of a dense layer and tanh between pooling and head. With it the final norm acts after pooling;
        with None, which leaves it out, the norm acts before.
      pool: `"avg"`, `"max"` or `"avgmax"` (mean of both).
      convolution: options of `models.layers.mbconv.MBConvOptions`, which the stem shares.
      activation: of the MLPs.
      attention, attention_options: by name, as in `models.hosts.isotropic.VisionTransformer`, of both attentions of a
        layer.
      block_attention: False leaves out the first of the two with its MLP.
      qkv_bias, proj_bias: of the attention's projections.
      layer_scale: initial value, of attentions and MLPs; None for no layer scale.
      norm_eps: of layer norms; that of batch norms is in `convolution`.
      drop_path: layer i of n has the rate `drop_path * i / n` in each of its five residual branches.
      dropout: after the attention's projection and both MLP layers. attention_dropout: on probabilities.
      head_dropout: before the head.
      init: scheme of all kernels (`models.core.init`); `"normal"` is the official one.
      scan: one leaf per parameter for all like layers of a stage, compiled once. remat: see `models.core.remat.REMAT`.
      dtype: of the computation, float32 unless given; parameters, norm statistics and softmax are float32.
    """

    bias_resample = "bilinear"
    """How tables of bias by relative position become those of another window: `tf.image.resize`, as officially."""

    def __init__(
        self,
        *,
        widths: Sequence[int],
        depths: Sequence[int],
        stem_widths: PerAxis = 64,
        stem_bias: bool = True,
        head_width: int = 32,
        window: PerAxis | None = None,
        grid_window: PerAxis | None = None,
        image_size: PerAxis = 224,
        num_classes: int = 1000,
        channels: int = 3,
        mlp_ratio: float = 4.0,
        pre_logits: int | None = None,
        pool: str = "avg",
        convolution: dict[str, Any] | None = None,
        activation: str = "gelu_tanh",
        attention: str = "window",
        attention_options: dict[str, Any] | None = None,
        block_attention: bool = True,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        layer_scale: float | None = None,
        norm_eps: float = 1e-5,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        head_dropout: float = 0.0,
        init: str = "normal",
        scan: bool = True,
        remat: str = "none",
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        if pool not in POOLS:
            raise ValueError(unknown_name("pool", pool, POOLS))
        if len(widths) != len(depths):
            raise ValueError(f"widths={tuple(widths)} and depths={tuple(depths)}: one entry for each stage is needed")
        if min(depths) < 1:
            raise ValueError(f"depths={tuple(depths)}: every stage has a layer at least")
        if wrong := [width for width in widths if width % head_width]:
            raise ValueError(f"width {wrong[0]} is not divisible by heads of {head_width} channels")
        start = scheme(init)
        # The base class drops after the stem, where these models do not.
        self.dropout, self.head_dropout, self.drop_path = 0.0, head_dropout, drop_path
        self.dtype, self.num_classes, self.pooling, self.head_width = dtype, num_classes, pool, head_width
        # Other mechanisms take any map, and so may this one with options of the user's.
        self.checks_maps = attention == "window" and not {"window", "padding"} & set(attention_options or ())
        self.window = _window("window", window, image_size)
        self.grid_window = self.window if grid_window is None else _window("grid_window", grid_window, image_size)

        stems = _pair(stem_widths)
        self.convolution = shared = _mbconv(convolution or {})
        self.patch_embed = MaxViTStem(
            channels, stems, use_bias=stem_bias, options=shared, init=init, dtype=dtype, rngs=rngs
        )
        makers, firsts = [], []
        for before, width in zip([stems[-1], *widths[:-1]], widths, strict=True):
            options = BlockOptions(
                width=width,
                heads=width // head_width,
                mlp_width=int(width * mlp_ratio),
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
            # Maps are never padded, officially; the bias is that of the attention's projection, not of the MLP.
            common = {"padding": False, "proj_bias": proj_bias}
            parts = (
                shared,
                dataclasses.replace(options, attention_defaults={**common, "window": self.window})
                if block_attention
                else None,
                dataclasses.replace(options, attention_defaults={**common, "window": self.grid_window, "grid": True}),
            )
            makers.append([partial(MaxViTBlock, width, *parts)])
            firsts.append(partial(StridedMaxViTBlock, before, *parts))
        made = [first(rngs) for first in firsts]
        stacks = stack_stages(makers, depths, rngs=rngs, scan=scan, remat=remat, own_first=True)
        self.stages = nnx.List([Stage(None, stack, first, remat) for stack, first in zip(stacks, made, strict=True)])
        self.norm = LayerNorm(widths[-1], eps=norm_eps, dtype=dtype)
        self.pre_logits = (
            Linear(widths[-1], pre_logits, kernel_init=start.pre_logits, dtype=dtype, rngs=rngs) if pre_logits else None
        )
        features = pre_logits or widths[-1]
        self.head = (
            Linear(features, num_classes, kernel_init=start.head, dtype=dtype, rngs=rngs) if num_classes else None
        )

    def enter(self, stage: int, x: Float[Array, "B Y X C"], *, train: bool, key: PRNGKeyArray | None) -> Array:
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

    def pool(self, x: Float[Array, "B Y X C"], *, train: bool) -> tuple[Float[Array, "B N C"], Float[Array, "B D"]]:
        """Tokens of the last stage, and the pooled features, behind norm and dense layer."""
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        if self.pre_logits is None:
            tokens = self.norm(tokens)
            return tokens, self._pooled(tokens)
        pooled = self.norm(self._pooled(tokens))
        return tokens, jnp.tanh(self.pre_logits(pooled))

    def _pooled(self, tokens: Float[Array, "B N C"]) -> Float[Array, "B C"]:
        return GLOBAL_POOLS[self.pooling](tokens)


def _window(option: str, window: PerAxis | None, image_size: PerAxis) -> tuple[int, int]:
    """Rows and columns. ValueError where there are none."""
    if window is None:
        rows, columns = (side // RATIO for side in _pair(image_size))
    else:
        rows, columns = _pair(window)
    if min(rows, columns) < 1:
        raise ValueError(f"{option}={window!r} for images of {image_size}: must be at least 1 along each axis")
    return rows, columns


def _pair(value: PerAxis) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _mbconv(options: dict[str, Any]) -> MBConvOptions:
    """ValueError for an option that there is not."""
    known = [field.name for field in dataclasses.fields(MBConvOptions)]
    for option in options:
        if option not in known:
            raise ValueError(unknown_name("option of convolution", option, known))
    return MBConvOptions(**options)
