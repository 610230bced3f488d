"""HaloNet: bottleneck blocks in four stages, with halo attention in all or some of them (arXiv:2103.12731).

One class holds the paper's models, whose spatial layers are all attention, and those of timm's byoanet, which mix it
with convolutions and with BoTNet's attention. Variants are in `models/families/halonet/variants.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attn import Grid
from models.attention.registry import checked_options
from models.core.call import Call
from models.core.errors import unknown_name
from models.core.init import normal
from models.core.options import Count, Flag, Positive, Size, check_choices, check_stages, each, pair
from models.core.stack import Stack, shortest_cycle
from models.core.tap import TOKENS
from models.families.halonet.block import GATES, SHORTCUTS, Bottleneck, BottleneckOptions
from models.hosts.hierarchy import Hierarchy, Stage, stack_stages
from models.hosts.options import ClassifierOptions
from models.layers.conv_norm import ConvNorm
from models.layers.linear import Head
from models.layers.stem import HaloStem

Layer = str | Mapping[str, Any]
POOLS = ("avg", "max", "avgmax")
KINDS: dict[str, dict[str, Any]] = {"conv": {}, "attention": {"attention": "halo"}}
"""What the names of layers stand for."""
OF_LAYERS = tuple(
    field.name
    for field in dataclasses.fields(BottleneckOptions)
    if field.name not in ("channels", "width", "stride", "attention_defaults", "grid", "zero_last", "dtype")
)
"""Options of a block that a layer may say for itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HaloOptions(ClassifierOptions):
    """Options of `HaloNet`, besides those of every classifier.

    Attributes:
      widths, depths: channels that the blocks of each stage give, and how many there are.
      strides: of the first block of each stage.
      layers: for each stage what its layers are, repeated as often as needed: `"conv"`, `"attention"`, or a mapping of
        options of `BottleneckOptions` that differ from the model's, such as `{"attention": "bottleneck", "heads": 4}`
        (its `attention_options` are those of the mechanism that it names).
      ratio: inner channels over the block's, one number or one for each stage; ratio_of_input: over its input's.
      heads: of attention layers, one number or one for each stage.
      attention: the mechanism of all attention layers; None: `"halo"`, and what a layer says otherwise.
      block_size, halo_size, padding, head_width, qk_ratio: see `models.attention.halo.HaloAttention`.
      value_ratio, group_width, gate, gate_options, shortcut, linear_out: see `BottleneckOptions`.
      stem, stem_size, stem_pool, stem_plain: see `models.layers.stem.HaloStem`.
      features: channels of the pointwise convolution behind the stages; 0 for none.
      pool: `"avg"`, `"max"`, or `"avgmax"`, the mean of both.
      image_size: which bottleneck attention has its positions for, and whose maps the blocks divide. Images may have
        any other such size.
      zero_last: the last norm of every residual branch starts at zero.
    """

    image_size: Count | tuple[Count, Count] = 256
    activation: str = "relu"
    attention: str | None = None
    widths: Sequence[Count]
    depths: Sequence[Count]
    strides: Sequence[Count] = (1, 2, 2, 2)
    layers: Sequence[Sequence[Any]] = (("attention",),) * 4
    ratio: Positive | Sequence[Positive] = 1.0
    ratio_of_input: Flag = False
    heads: Count | Sequence[Count] = 8
    block_size: Count = 8
    halo_size: Size = 3
    padding: Flag = False
    head_width: Count | None = None
    qk_ratio: Positive = 1.0
    value_ratio: Positive = 1.0
    group_width: Size = 0
    gate: str | None = None
    gate_options: Mapping[str, Any] | None = None
    shortcut: str = "conv"
    linear_out: Flag = False
    stem: Sequence[Count] = (64,)
    stem_size: Count = 7
    stem_pool: str | None = "max"
    stem_plain: Size = 0
    features: Size = 0
    pool: str = "avg"
    zero_last: Flag = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stages(widths=self.widths, depths=self.depths, strides=self.strides, layers=self.layers)
        check_choices(pool=(self.pool, POOLS), shortcut=(self.shortcut, SHORTCUTS), gate=(self.gate or "se", GATES))

    def kinds(self) -> list[list[dict[str, Any]]]:
        """What each layer of each stage says for itself.

        Raises:
          ValueError: a kind of layer or an option of one that there is not.
        """
        found = []
        for stage, depth in zip(self.layers, self.depths, strict=False):
            if not stage:
                raise ValueError(f"layers={self.layers!r}: a stage of no layers")
            found.append([_kind(stage[number % len(stage)]) for number in range(depth)])
        return found

    def mechanisms(self) -> tuple[str, ...]:
        """Names of the mechanisms of the model, each once."""
        names = [kind["attention"] for stage in self.kinds() for kind in stage if kind.get("attention")]
        return tuple(dict.fromkeys([self.attention] * bool(names) if self.attention else names))

    def for_mechanisms(self) -> Mapping[str, tuple[str, ...]]:
        """Blocks are for halo attention."""
        relative = ("halo", "bottleneck")
        blocks = dict.fromkeys(("block_size", "halo_size", "padding"), ("halo",))
        return blocks | dict.fromkeys(("head_width", "qk_ratio", "value_ratio"), relative)

    def attention_defaults(self) -> dict[str, dict[str, Any]]:
        """What the model says to mechanisms, by their names."""
        both = {"qk_ratio": self.qk_ratio, "head_width": self.head_width}
        halo = {"block_size": self.block_size, "halo_size": self.halo_size, "padding": self.padding, **both}
        return {"halo": halo, "bottleneck": both}


class HaloNet(Hierarchy):
    """Stem, stages of bottleneck blocks, perhaps a pointwise convolution, mean, head.

    The first block of a stage is on its own (`Stage.first`): it changes channels, and has the stage's stride.
    """

    Options = HaloOptions  # type: ignore[assignment]
    options: HaloOptions  # type: ignore[assignment]
    patch_embed: HaloStem

    def __init__(self, options: HaloOptions, *, rngs: nnx.Rngs):
        o = self.options = options
        # Dropout of the stem and between stages is not there in these models.
        self.dropout, self.head_dropout, self.drop_path = 0.0, o.head_dropout, o.drop_path
        self.dtype, self.num_classes = o.dtype, o.num_classes
        shared: dict[str, Any] = {"activation": o.activation, "dtype": o.dtype, "rngs": rngs}
        self.patch_embed = HaloStem(
            o.channels, o.stem, size=o.stem_size, pool=o.stem_pool, plain=o.stem_plain, **shared
        )
        stages = self._blocks()
        firsts = [Bottleneck(blocks[0], rngs) for blocks in stages]
        rests = [[partial(Bottleneck, block) for block in shortest_cycle(blocks[1:])] for blocks in stages]
        stacks = stack_stages(rests, o.depths, rngs=rngs, scan=o.scan, remat=o.remat, own_first=True)
        self.stages = nnx.List([Stage(None, stack, first) for stack, first in zip(stacks, firsts, strict=True)])
        self.multiples = tuple(map(_multiples, self.stages))
        self.final_conv = ConvNorm(o.widths[-1], o.features, **shared) if o.features else None
        head = {"kernel_init": normal(0.01), "dtype": o.dtype, "rngs": rngs}
        self.head = Head(o.features or o.widths[-1], o.num_classes, **head) if o.num_classes else None

    def _blocks(self) -> list[list[BottleneckOptions]]:
        """Options of the blocks of each stage."""
        o = self.options
        ratios, heads = each("ratio", o.ratio, len(o.depths)), each("heads", o.heads, len(o.depths))
        sides = _smaller(pair(o.image_size), self.patch_embed.stride)
        own = BottleneckOptions(
            o.stem[-1],
            o.stem[-1],
            ratio_of_input=o.ratio_of_input,
            value_ratio=o.value_ratio,
            attention_defaults=o.attention_defaults(),
            attention_dropout=o.attention_dropout,
            group_width=o.group_width,
            gate=o.gate,
            gate_options=o.gate_options or {},
            shortcut=o.shortcut,
            activation=o.activation,
            linear_out=o.linear_out,
            zero_last=o.zero_last,
            dtype=o.dtype,
        )
        found = []
        for stage, kinds in enumerate(o.kinds()):
            blocks = []
            for number, kind in enumerate(kinds):
                stride = 1 if number else o.strides[stage]
                own = dataclasses.replace(
                    own,
                    channels=own.width,
                    width=o.widths[stage],
                    stride=stride,
                    ratio=ratios[stage],
                    heads=heads[stage],
                )
                blocks.append(self._block(own, kind, sides))
                sides = _smaller(sides, stride)
            found.append(blocks)
        return found

    def _block(self, own: BottleneckOptions, kind: dict[str, Any], sides: Sequence[int]) -> BottleneckOptions:
        """A layer's options, from those of all layers; `sides` are those of the map before it at the model's image
        size.
        """
        kind, defaults = dict(kind), dict(own.attention_defaults)
        said = kind.pop("attention_options", None) or {}
        block = dataclasses.replace(own, **kind)
        if block.attention is None:
            return dataclasses.replace(block, attention_defaults={})
        defaults[block.attention] = {**defaults.get(block.attention, {}), **checked_options(block.attention, said)}
        name = self.options.attention or block.attention
        grid = Grid(_smaller(sides, own.stride if block.extra_conv else 1))
        return dataclasses.replace(
            block,
            attention=name,
            attention_options=self.options.attention_options,
            attention_defaults=defaults,
            grid=grid,
        )

    def enter(self, stage: int, x: Float[Array, "B Y X C"], call: Call) -> Array:
        """The map as it is.

        Raises:
          ValueError: the stage's attention cannot cut it into blocks; the line says which images it can.
        """
        sides, stride = x.shape[1:3], self.options.strides[stage]
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
        total, reduction = 1, self.patch_embed.stride
        for (before, after), stride in zip(self.multiples, self.options.strides, strict=True):
            total = math.lcm(total, before * reduction, after * reduction * stride)
            reduction *= stride
        return math.lcm(total, reduction)

    def pool(self, x: Float[Array, "B Y X C"], call: Call) -> tuple[Float[Array, "B N D"], Float[Array, "B D"]]:
        """Tokens behind the last convolution, and what the head is given."""
        with jax.named_scope("final_conv"):
            x = x if self.final_conv is None else self.final_conv(x, train=call.train)
            tokens = call.emit("norm", x.reshape(x.shape[0], -1, x.shape[-1]), TOKENS)
            if self.options.pool == "avg":
                return tokens, tokens.mean(axis=1, dtype=jnp.float32).astype(x.dtype)
            # By place: a maximum's own gradient looks for equal numbers, of which a compiler that rounds twice finds
            # none.
            place = jax.lax.stop_gradient(tokens).argmax(axis=1, keepdims=True)
            largest = jnp.take_along_axis(tokens, place, axis=1)[:, 0]
            if self.options.pool == "max":
                return tokens, largest
            return tokens, (0.5 * (tokens.mean(axis=1, dtype=jnp.float32) + largest)).astype(x.dtype)


def _kind(layer: Layer) -> dict[str, Any]:
    """What a layer says for itself."""
    if isinstance(layer, str) and layer not in KINDS:
        raise ValueError(unknown_name("kind of layer", layer, KINDS))
    if not isinstance(layer, str | Mapping):
        raise ValueError(f"layer {layer!r}; allowed: {', '.join(KINDS)}, or a dictionary of options of a block")
    said = dict(KINDS[layer] if isinstance(layer, str) else layer)
    for option in said:
        if option not in OF_LAYERS:
            raise ValueError(unknown_name("option of a layer", str(option), OF_LAYERS))
    return said


def _multiples(stage: Stage) -> tuple[int, int]:
    """What the sides of the stage's map have to be multiples of, before and after the stride of its first block."""

    def multiple(block: nnx.Module | None) -> int:
        return getattr(getattr(block, "attn", None), "multiple", 1)

    blocks = stage.blocks.blocks if isinstance(stage.blocks, Stack) else []
    return multiple(stage.first), math.lcm(*map(multiple, blocks))


def _smaller(sides: Sequence[int], stride: int) -> tuple[int, ...]:
    return tuple(-(-side // stride) for side in sides)
