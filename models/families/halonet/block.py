"""The bottleneck block of HaloNets: pointwise convolution, attention or a convolution, pointwise convolution.

That of ResNet (arXiv:1512.03385) with its spatial layer exchanged, as in BoTNet (arXiv:2101.11605) and HaloNet
(arXiv:2103.12731); its options are those of timm's byobnet that members of byoanet use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from attn import Grid
from models.attention.mechanism import Mechanism
from models.attention.registry import checked_options, make_attention, mechanism
from models.core import sharding
from models.core.call import Call
from models.core.draw import full
from models.core.errors import unknown_name
from models.core.tap import TOKENS
from models.layers.activation import ACTIVATIONS
from models.layers.conv_norm import HE, ConvNorm
from models.layers.drop import drop_path
from models.layers.gate import EfficientChannelAttention, SqueezeExcite, channel_kernel, rounded_channels
from models.layers.linear import DType
from models.layers.norm import BatchNorm
from models.layers.pool import half

SHORTCUTS = ("conv", "average", "none")
GATES = ("se", "eca")


class AverageShortcut(nnx.Module):
    """Mean of 2 x 2 places if there is a stride, then a pointwise convolution and a norm (ResNet-D,
    arXiv:1812.01187)."""

    def __init__(self, channels: int, width: int, *, stride: int, dtype: DType, rngs: nnx.Rngs):
        self.stride = stride
        self.conv = ConvNorm(channels, width, activation=None, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B Y X I"], *, train: bool) -> Float[Array, "B V U O"]:
        """Sides become `ceil(n / stride)`."""
        return self.conv(half(x) if self.stride == 2 else x, train=train)


@dataclasses.dataclass(frozen=True)
class BottleneckOptions:
    """What a bottleneck block is made of.

    Attributes:
      channels, width: of its input and output.
      stride: of its spatial layer and shortcut.
      ratio: inner channels over `width` (over `channels` with `ratio_of_input`), rounded to a multiple of 8.
      attention: its spatial layer, a name of `models.attention.registry.ATTENTION`; None for a convolution. Behind one
        that has no stride stands a mean of 2 x 2 places.
      value_ratio: channels of the attention's values over the inner ones, for a mechanism that has them apart.
      attention_options: the user's; attention_defaults: the model's, by names of mechanisms. attention_dropout: on
        probabilities.
      grid: the map in front of the attention, which it is made for.
      size, group_width: of the convolution, and channels of its groups (0: no groups).
      extra_conv: a convolution more: behind the first one, or before the attention, where it has the stride.
      gate: behind the convolution, `"se"` or `"eca"`; gate_last: behind the last pointwise convolution instead.
      gate_options: `ratio`, `hidden`, `divisor`, `activation`, `gate`, `use_bias` (se), `gamma`, `beta`, `gate` (eca).
      shortcut: where the block changes the map's size or channels: `"conv"` (pointwise, with the stride), `"average"`,
        or `"none"` for a block that is no residual there.
      post_norm: batch norm and activation behind the attention.
      linear_out: no activation behind the sum.
      zero_last: the last norm of the branch starts at zero where there is a shortcut.
    """

    channels: int
    width: int
    stride: int = 1
    ratio: float = 1.0
    ratio_of_input: bool = False
    attention: str | None = None
    heads: int = 8
    value_ratio: float = 1.0
    attention_options: Mapping[str, Any] | None = None
    attention_defaults: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    attention_dropout: float = 0.0
    grid: Grid | None = None
    size: int = 3
    group_width: int = 0
    extra_conv: bool = False
    gate: str | None = None
    gate_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gate_last: bool = False
    shortcut: str = "conv"
    activation: str = "relu"
    post_norm: bool = True
    linear_out: bool = False
    zero_last: bool = True
    dtype: DType = None

    def __post_init__(self) -> None:
        if self.stride not in (1, 2):
            raise ValueError(f"stride={self.stride} of a block; allowed: 1, 2")
        for option, value, allowed in (
            ("shortcut", self.shortcut, SHORTCUTS),
            ("gate", self.gate or "se", GATES),
            ("activation", self.activation, ACTIVATIONS),
        ):
            if value not in allowed:
                raise ValueError(unknown_name(option, value, allowed))

    @property
    def inner(self) -> int:
        """Channels between the pointwise convolutions."""
        return rounded_channels((self.channels if self.ratio_of_input else self.width) * self.ratio)

    @property
    def changes(self) -> bool:
        """Whether the block changes the map's size or channels."""
        return self.channels != self.width or self.stride != 1

    def make_shortcut(self, rngs: nnx.Rngs) -> nnx.Module | None:
        """The layer on the shortcut; None for a shortcut that is the input, and for no shortcut."""
        if not self.changes or self.shortcut == "none":
            return None
        shared: dict[str, Any] = {"stride": self.stride, "dtype": self.dtype, "rngs": rngs}
        if self.shortcut == "average":
            return AverageShortcut(self.channels, self.width, **shared)
        return ConvNorm(self.channels, self.width, activation=None, **shared)

    @property
    def gives_heads(self) -> bool:
        """Whether the attention gives heads side by side, and itself makes the map smaller."""
        return self.attention is not None and mechanism(self.attention).declaration.shape == "heads"

    def make_attention(self, stride: int, rngs: nnx.Rngs) -> Mechanism:
        """The named mechanism, with the stride if it gives heads."""
        name = str(self.attention)
        shared = {"qkv_bias": False, "dropout": self.attention_dropout, "dtype": self.dtype}
        own = {"width_out": round(self.inner * self.value_ratio), "stride": stride} if self.gives_heads else {}
        options = {**own, **self.attention_defaults.get(name, {}), **checked_options(name, self.attention_options)}
        return make_attention(name, self.inner, self.heads, shared=shared, options=options, grid=self.grid, rngs=rngs)

    def make_gate(self, width: int, rngs: nnx.Rngs) -> nnx.Module | None:
        """The gate of so many channels."""
        if self.gate is None:
            return None
        options: dict[str, Any] = dict(self.gate_options)
        if self.gate == "eca":
            size = channel_kernel(width, options.pop("gamma", 2.0), options.pop("beta", 1.0))
            return EfficientChannelAttention(width, size=size, **options, dtype=self.dtype, rngs=rngs)
        hidden = options.pop("hidden", None)
        ratio, divisor = options.pop("ratio", 1 / 16), options.pop("divisor", 8)
        hidden = hidden or rounded_channels(width * ratio, divisor, round_limit=0.0)
        options = {"activation": "relu", "kernel_init": HE, "dtype": self.dtype} | options
        return SqueezeExcite(width, hidden, **options, rngs=rngs)


class Bottleneck(nnx.Module):
    """`activation(shortcut(x) + branch(x))`; see `BottleneckOptions`.

    The branch: pointwise convolution, norm, activation; a convolution, norm and activation, then a gate, or attention,
    norm and activation; pointwise convolution and norm.
    """

    def __init__(self, options: BottleneckOptions, rngs: nnx.Rngs):
        o = options
        shared: dict[str, Any] = {"activation": o.activation, "dtype": o.dtype, "rngs": rngs}
        linear = {**shared, "activation": None}
        conv = partial(ConvNorm, o.inner, o.inner, size=o.size, group_width=o.group_width, **shared)
        attends = o.attention is not None
        self.activation, self.linear_out = o.activation, o.linear_out
        self.residual = o.shortcut != "none" or not o.changes
        self.shortcut = o.make_shortcut(rngs)
        self.conv1 = ConvNorm(o.channels, o.inner, **shared)
        self.conv2 = conv(stride=o.stride) if o.extra_conv or not attends else None
        self.conv2b = conv() if o.extra_conv and not attends else None
        stride = 1 if o.extra_conv else o.stride
        self.attn = o.make_attention(stride, rngs) if attends else None
        # What the attention does not do itself is done behind it.
        self.stride_inside, self.stride_behind = (stride, 1) if o.gives_heads else (1, stride)
        inner = getattr(self.attn, "width_out", o.inner)
        self.post_norm = BatchNorm(inner, dtype=o.dtype) if attends and o.post_norm else None
        self.gate = None if attends or o.gate_last else o.make_gate(o.inner, rngs)
        self.conv3 = ConvNorm(inner, o.width, **linear)
        self.gate_last = o.make_gate(o.width, rngs) if o.gate_last and not attends else None
        if o.zero_last and self.residual:
            self.conv3.norm.scale = nnx.Param(full((o.width,), 0))

    def __call__(self, x: Float[Array, "B ... C"], call: Call) -> Float[Array, "B ... O"]:
        """The new map of a map, or the new tokens of tokens.

        A block that is no residual has no branch that drop path could skip.
        """
        train, tokens, shape = call.train, x.ndim == 3, (x.shape[0], *call.grid.shape, x.shape[-1])
        places = call.emit("block.in", x.reshape(x.shape[0], -1, x.shape[-1]), TOKENS).reshape(shape)
        y = self.conv1(places, train=train)
        y = y if self.conv2 is None else self.conv2(y, train=train)
        y = y if self.conv2b is None else self.conv2b(y, train=train)
        if self.attn is not None:
            sides = y.shape[1:3]
            y = self.attn(y.reshape(shape[0], -1, y.shape[-1]), call.at("attn", grid=Grid(sides)))
            y = y.reshape(shape[0], *(-(-side // self.stride_inside) for side in sides), y.shape[-1])
            y = half(y) if self.stride_behind == 2 else y
        if self.post_norm is not None:
            y = ACTIVATIONS[self.activation](self.post_norm(y, train=train))
        y = y if self.gate is None else self.gate(y)
        y = self.conv3(y, train=train)
        y = y if self.gate_last is None else self.gate_last(y)
        if self.residual:
            y = drop_path(y, call.drop_path, train=train, key=call.key_for("drop_path"))
            y = y + (places if self.shortcut is None else self.shortcut(places, train=train))
        y = sharding.over_batch(y if self.linear_out else ACTIVATIONS[self.activation](y))
        out = call.emit("block.out", y.reshape(shape[0], -1, y.shape[-1]), TOKENS)
        return out if tokens else out.reshape(y.shape)
