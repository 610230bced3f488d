"""HaloNet: bottleneck blocks in four stages, with halo attention in all or some of them (arXiv:2103.12731).

One class holds the paper's models, whose spatial layers are all attention, and those of timm's byoanet, which mix it
with convolutions and with BoTNet's attention. Variants are in `models/families/halonet/variants.py`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from attn import Hook
from models.core.errors import unknown_name
from models.core.stack import shortest_cycle
from models.families.halonet.block import Bottleneck, BottleneckOptions
from models.hosts.hierarchy import Hierarchy, Stage, stack_stages
from models.layers.conv_norm import ConvNorm
from models.layers.drop import dropout, fold_key
from models.layers.linear import DType, Linear
from models.layers.stem import HaloStem

PerStage = float | Sequence[float]
Layer = str | Mapping[str, Any]
POOLS = ("avg", "max", "avgmax")
KINDS: dict[str, dict[str, Any]] = {"conv": {}, "attention": {"attention": "halo"}}
"""What the names of layers stand for."""
OF_LAYERS = tuple(
    field.name
    for field in dataclasses.fields(BottleneckOptions)
    if field.name not in ("channels", "width", "stride", "attention_options", "zero_last", "dtype")
)
"""Options of a block that a layer may say for itself."""


class HaloNet(Hierarchy):
    """Stem, stages of bottleneck blocks, perhaps a pointwise convolution, mean, head.

    The first block of a stage is on its own (`Stage.first`): it changes channels, and has the stage's stride.

    Args:
      widths, depths: channels that the blocks of each stage give, and how many there are.
      strides: of the first block of each stage.
      layers: for each stage what its layers are, repeated as often as needed: `"conv"`, `"attention"`, or a mapping of
        options of `BottleneckOptions` that differ from the model's, such as `{"attention": "bottleneck", "heads": 4}`
        (its `attention_defaults` are added to the model's).
      ratio: inner channels over the block's, one number or one for each stage; ratio_of_input: over its input's.
      heads: of attention layers, one number or one for each stage.
      attention: the mechanism of all attention layers by name (`models.attention.registry.ATTENTION`); None: `"halo"`,
        and what a layer says otherwise. attention_options: its own options.
      block, halo, padding, head_width, qk_ratio: see `HaloAttention`; they go to mechanisms that have them.
      value_ratio, group_width, gate, gate_options, shortcut, linear_out: see `BottleneckOptions`.
      stem, stem_size, stem_pool, stem_plain: see `HaloStem`.
      features: channels of the pointwise convolution behind the stages; 0 for none.
      pool: `"avg"`, `"max"`, or `"avgmax"`, the mean of both.
      image_size: side in pixels, or (height, width), which bottleneck attention has its positions for. Images may have
        any size whose maps the blocks divide.
      num_classes: 0 for no head; the model then returns pooled features.
      zero_last: the last norm of every residual branch starts at zero.
      drop_path: rate of the last layer; layer i of n has `drop_path * i / (n - 1)`.
      dropout: before the head. attention_dropout: on probabilities.
      scan: one leaf per parameter for all like layers of a stage, compiled once. remat: see `models.core.remat.REMAT`.
      dtype: of the computation, float32 unless given; parameters, norm statistics and softmax are float32.
    """

    patch_embed: HaloStem

    def __init__(
        self,
        *,
        widths: Sequence[int],
        depths: Sequence[int],
        strides: Sequence[int] = (1, 2, 2, 2),
        layers: Sequence[Sequence[Layer]] = (("attention",),) * 4,
        ratio: PerStage = 1.0,
        ratio_of_input: bool = False,
        heads: int | Sequence[int] = 8,
        attention: str | None = None,
        attention_options: dict[str, Any] | None = None,
        block: int = 8,
        halo: int = 3,
        padding: bool = False,
        head_width: int | None = None,
        qk_ratio: float = 1.0,
        value_ratio: float = 1.0,
        group_width: int = 0,
        gate: str | None = None,
        gate_options: Mapping[str, Any] | None = None,
        shortcut: str = "conv",
        activation: str = "relu",
        linear_out: bool = False,
        stem: Sequence[int] = (64,),
        stem_size: int = 7,
        stem_pool: str | None = "max",
        stem_plain: int = 0,
        features: int = 0,
        pool: str = "avg",
        image_size: int | tuple[int, int] = 256,
        num_classes: int = 1000,
        channels: int = 3,
        zero_last: bool = True,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        scan: bool = True,
        remat: str = "none",
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        if len({len(depths), len(widths), len(strides), len(layers)}) != 1:
            raise ValueError(
                f"widths={tuple(widths)}, depths={tuple(depths)}, strides={tuple(strides)} and layers of {len(layers)} "
                "stages: one entry for each stage is needed"
            )
        if pool not in POOLS:
            raise ValueError(unknown_name("pool", pool, POOLS))
        # Those of the stem and between stages belong to the attention of the model, not to the embedding.
        self.dropout, self.head_dropout = 0.0, dropout
        self.drop_path, self.dtype, self.num_classes, self.pooling = drop_path, dtype, num_classes, pool
        shared: dict[str, Any] = {"activation": activation, "dtype": dtype, "rngs": rngs}
        self.patch_embed = HaloStem(channels, stem, size=stem_size, pool=stem_pool, plain=stem_plain, **shared)
        defaults = {
            "block": block,
            "halo": halo,
            "padding": padding,
            "head_width": head_width,
            "qk_ratio": qk_ratio,
            "dropout": attention_dropout,
        }
        common = BottleneckOptions(
            stem[-1],
            stem[-1],
            ratio_of_input=ratio_of_input,
            value_ratio=value_ratio,
            attention_defaults={name: value for name, value in defaults.items() if value is not None},
            attention_options=attention_options,
            group_width=group_width,
            gate=gate,
            gate_options=gate_options or {},
            shortcut=shortcut,
            activation=activation,
            linear_out=linear_out,
            zero_last=zero_last,
            dtype=dtype,
        )
        sides = (image_size,) * 2 if isinstance(image_size, int) else tuple(image_size)
        sides = _smaller(sides, self.patch_embed.stride)
        firsts, rests = [], []
        ratios, all_heads = _per_stage(ratio, depths), _per_stage(heads, depths)
        for stage, (width, depth, stride) in enumerate(zip(widths, depths, strides, strict=True)):
            own = dataclasses.replace(common, ratio=ratios[stage], heads=int(all_heads[stage]))
            kinds = [layers[stage][number % len(layers[stage])] for number in range(depth)]
            blocks = []
            for number, kind in enumerate(kinds):
                own = dataclasses.replace(own, channels=own.width, width=width, stride=1 if number else stride)
                blocks.append(_layer_options(own, kind, attention, sides))
                sides = _smaller(sides, own.stride)
            firsts.append(Bottleneck(blocks[0], rngs))
            rests.append([partial(Bottleneck, options) for options in shortest_cycle(blocks[1:])])
            common = dataclasses.replace(common, width=width)
        stacks = stack_stages(rests, depths, rngs=rngs, scan=scan, remat=remat, own_first=True)
        self.stages = nnx.List([Stage(None, stack, first) for stack, first in zip(stacks, firsts, strict=True)])
        self.strides, self.reduction = tuple(strides), self.patch_embed.stride
        self.multiples = tuple(map(_multiples, self.stages))
        self.final_conv = ConvNorm(widths[-1], features, **shared) if features else None
        normal = jax.nn.initializers.normal(0.01)
        self.head = (
            Linear(features or widths[-1], num_classes, kernel_init=normal, dtype=dtype, rngs=rngs)
            if num_classes
            else None
        )

    def enter(self, stage: int, x: Float[Array, "B Y X C"], *, train: bool, key: PRNGKeyArray | None) -> Array:
        """The map as it is.

        Raises:
          ValueError: the stage's attention cannot cut it into blocks; the line says which images it can.
        """
        sides, stride = x.shape[1:3], self.strides[stage]
        for shape, multiple in zip((sides, _smaller(sides, stride)), self.multiples[stage], strict=True):
            if any(side % multiple for side in shape):
                raise ValueError(
                    f"image size: blocks of {multiple} do not divide the map of {shape} in stage {stage}; images whose "
                    f"height and width are multiples of {self.multiple} fit"
                )
        return x

    @property
    def multiple(self) -> int:
        """Images whose sides are multiples of this have maps that the blocks of every stage divide."""
        total, reduction = 1, self.reduction
        for (before, after), stride in zip(self.multiples, self.strides, strict=True):
            total = math.lcm(total, before * reduction, after * reduction * stride)
            reduction *= stride
        return math.lcm(total, reduction)

    def classify(
        self, x: Float[Array, "B Y X C"], *, hook: Hook | None, train: bool, key: PRNGKeyArray | None
    ) -> dict[str, Array]:
        """`"tokens"` behind the last convolution, `"pooled"` and, with a head, `"logits"`."""
        outputs: dict[str, Array] = {}
        with jax.named_scope("final_conv"):
            outputs["tokens"], outputs["pooled"] = self.pool(x, train=train)
        if self.head is not None:
            with jax.named_scope("head"):
                pooled = dropout(outputs["pooled"], self.head_dropout, train=train, key=fold_key(key, 0))
                outputs["logits"] = self.head(pooled).astype(jnp.float32)
        return outputs

    def pool(self, x: Float[Array, "B Y X C"], *, train: bool) -> tuple[Float[Array, "B N C"], Float[Array, "B C"]]:
        """Tokens behind the last convolution, and what the head is given."""
        x = x if self.final_conv is None else self.final_conv(x, train=train)
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        if self.pooling == "avg":
            return tokens, tokens.mean(axis=1, dtype=jnp.float32).astype(x.dtype)
        # By place: a maximum's own gradient looks for equal numbers, of which a compiler that rounds twice finds none.
        place = jax.lax.stop_gradient(tokens).argmax(axis=1, keepdims=True)
        largest = jnp.take_along_axis(tokens, place, axis=1)[:, 0]
        if self.pooling == "max":
            return tokens, largest
        return tokens, (0.5 * (tokens.mean(axis=1, dtype=jnp.float32) + largest)).astype(x.dtype)


def _layer_options(
    own: BottleneckOptions, kind: Layer, attention: str | None, sides: Sequence[int]
) -> BottleneckOptions:
    """A layer's options, from those of all layers; `sides` are those of the map before it at the model's image size."""
    if isinstance(kind, str) and kind not in KINDS:
        raise ValueError(unknown_name("kind of layer", kind, KINDS))
    said = dict(KINDS[kind] if isinstance(kind, str) else kind)
    for option in said:
        if option not in OF_LAYERS:
            raise ValueError(unknown_name("option of a layer", option, OF_LAYERS))
    defaults = {**own.attention_defaults, **said.pop("attention_defaults", {})}
    options = dataclasses.replace(own, **said)
    if options.attention is None:
        return dataclasses.replace(options, attention_defaults={}, attention_options=None)
    name = options.attention if attention is None else attention
    if name == "bottleneck":
        defaults = defaults | {"shape": _smaller(sides, own.stride if options.extra_conv else 1)}
    return dataclasses.replace(options, attention=name, attention_defaults=defaults)


def _multiples(stage: Stage) -> tuple[int, int]:
    """What the sides of the stage's map have to be multiples of, before and after the stride of its first block."""

    def multiple(block: nnx.Module | None) -> int:
        return getattr(getattr(block, "attn", None), "multiple", 1)

    stack = stage.blocks
    blocks = [] if stack is None else [child for name, child in vars(stack).items() if isinstance(child, Bottleneck)]
    return multiple(stage.first), math.lcm(*map(multiple, blocks))


def _per_stage(value: PerStage, depths: Sequence[int]) -> list[float]:
    values = list(value) if isinstance(value, Sequence) else [value] * len(depths)
    if len(values) != len(depths):
        raise ValueError(f"{tuple(values)} for {len(depths)} stages: one entry for each stage is needed, or a number")
    return values


def _smaller(sides: Sequence[int], stride: int) -> tuple[int, ...]:
    return tuple(-(-side // stride) for side in sides)
