"""MBConv: a depthwise convolution between two pointwise ones, with a gate of channels, on a residual branch."""

import dataclasses

from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from models.core.errors import unknown_name
from models.core.init import scheme
from models.layers import drop as noise
from models.layers.activation import ACTIVATIONS
from models.layers.conv import Conv
from models.layers.gate import SqueezeExcite, rounded_channels
from models.layers.linear import DType, Linear, computed
from models.layers.norm import BatchNorm
from models.layers.pool import POOLS, pool_half

STRIDES_AT = ("depthwise", "expand", "pool")
GATES_AT = ("after_norm", "before_norm", "none")
PADDINGS = ("same", "centred")


@dataclasses.dataclass(frozen=True)
class MBConvOptions:
    """What an MBConv is made of; the defaults are those of MaxViT (arXiv:2204.01697, appendix A.1).

    Attributes:
      expansion: hidden channels over those of the output, or of the input (`expand_output=False`), rounded to a
        multiple of 8.
      size: side of the depthwise kernel.
      group_size: channels that mix in that kernel: 1 is depthwise, 0 all.
      gate_ratio: hidden channels of the gate over those of the output, or over the expanded ones if the expansion is
        counted from the input.
      gate_at: after the norm and activation of the depthwise convolution, before them, or none.
      stride_at: what a stride acts in: the depthwise convolution, the first pointwise one, or a pool before that.
      shortcut_pool, stride_pool: how the shortcut, and the branch where `stride_at="pool"`, become smaller: mean or
        maximum of 2 x 2 (`"avg2"`, `"max2"`) or 3 x 3 places.
      padding: of convolutions and pools (`models.layers.conv.Conv`), `"same"` as TensorFlow or `"centred"`.
      pre_norm_activation: an activation after the first norm, too.
      output_bias: biases of the last pointwise convolution and of the one on the shortcut.
      norm_eps, momentum: of batch normalization (`models.layers.norm.BatchNorm`).
    """

    expansion: float = 4.0
    expand_output: bool = True
    size: int = 3
    group_size: int = 1
    gate_ratio: float = 0.25
    gate_activation: str = "silu"
    gate_at: str = "after_norm"
    stride_at: str = "depthwise"
    shortcut_pool: str = "avg2"
    stride_pool: str = "avg2"
    padding: str = "same"
    activation: str = "gelu_tanh"
    pre_norm_activation: bool = False
    output_bias: bool = True
    norm_eps: float = 1e-3
    momentum: float = 0.99

    def __post_init__(self):
        for option, value, allowed in (
            ("stride_at", self.stride_at, STRIDES_AT),
            ("gate_at", self.gate_at, GATES_AT),
            ("shortcut_pool", self.shortcut_pool, POOLS),
            ("stride_pool", self.stride_pool, POOLS),
            ("padding", self.padding, PADDINGS),
            ("activation", self.activation, ACTIVATIONS),
            ("gate_activation", self.gate_activation, ACTIVATIONS),
        ):
            if value not in allowed:
                raise ValueError(unknown_name(f"{option} of MBConv", value, allowed))

    def hidden(self, channels: int, width: int) -> int:
        """Channels between the pointwise convolutions."""
        return rounded_channels((width if self.expand_output else channels) * self.expansion)

    def gate_hidden(self, channels: int, width: int) -> int:
        """Channels inside the gate: a sixteenth of the expanded ones where the ratio gives none, as in timm."""
        hidden = self.hidden(channels, width)
        inside = int(self.gate_ratio * (width if self.expand_output else hidden))
        return inside or rounded_channels(hidden / 16, round_limit=0.0)


class MBConv(nnx.Module):
    """`shortcut(x) + branch(x)`, pre-activation form (arXiv:1801.04381, 2204.01697).

    The branch: batch norm; pointwise convolution to the hidden channels, batch norm, activation; depthwise convolution,
    batch norm, activation; squeeze-excite gate; pointwise convolution. The shortcut: a pool if there is a stride, a
    pointwise convolution if the width changes.

    Args:
      stride: 1 or 2.
      init: scheme of all kernels (`models.core.init`).
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        stride: int = 1,
        options: MBConvOptions = MBConvOptions(),
        init: str = "normal",
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        if stride not in (1, 2):
            raise ValueError(f"stride={stride} of MBConv; allowed: 1, 2")
        self.stride, self.options, self.dtype = stride, options, computed(dtype)
        start, hidden = scheme(init), options.hidden(channels, width)
        if options.group_size and hidden % options.group_size:
            raise ValueError(f"group_size={options.group_size} of MBConv does not divide its {hidden} hidden channels")
        shared = {"dtype": dtype, "rngs": rngs}
        norm = {"eps": options.norm_eps, "momentum": options.momentum, "dtype": dtype}
        # Pointwise convolutions are matrix products: on CPUs their gradients take less than half the time so.
        pointwise = {"kernel_init": start.linear, **shared}
        self.shortcut = (
            Linear(channels, width, use_bias=options.output_bias, **pointwise) if channels != width else None
        )
        self.pre_norm = BatchNorm(channels, **norm)
        self.conv1 = Linear(channels, hidden, use_bias=False, **pointwise)
        self.norm1 = BatchNorm(hidden, **norm)
        self.conv2 = Conv(
            hidden,
            hidden,
            size=options.size,
            stride=stride if options.stride_at == "depthwise" else 1,
            padding=options.padding,
            groups=hidden // options.group_size if options.group_size else 1,
            use_bias=False,
            kernel_init=start.patch,
            **shared,
        )
        self.norm2 = BatchNorm(hidden, **norm)
        self.se = (
            None
            if options.gate_at == "none"
            else SqueezeExcite(
                hidden,
                options.gate_hidden(channels, width),
                activation=options.gate_activation,
                kernel_init=start.patch,
                **shared,
            )
        )
        self.conv3 = Linear(hidden, width, use_bias=options.output_bias, **pointwise)

    def __call__(
        self,
        x: Float[Array, "B Y X I"],
        *,
        drop_path: float | Array = 0.0,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B V U C"]:
        """The new map.

        Args:
          drop_path: probability that an example skips the branch; may be traced.
          key: for drop path.
        """
        x = x.astype(self.dtype)
        options, smaller = self.options, self.stride == 2
        activate = ACTIVATIONS[options.activation]
        shortcut = pool_half(x, options.shortcut_pool, options.padding) if smaller else x
        shortcut = shortcut if self.shortcut is None else self.shortcut(shortcut)

        y = self.pre_norm(x, train=train)
        y = activate(y) if options.pre_norm_activation else y
        if smaller and options.stride_at == "pool":
            y = pool_half(y, options.stride_pool, options.padding)
        if smaller and options.stride_at == "expand":
            y = y[:, ::2, ::2]
        y = activate(self.norm1(self.conv1(y), train=train))
        y = self.conv2(y)
        if self.se is not None and options.gate_at == "before_norm":
            y = self.se(y)
        y = activate(self.norm2(y, train=train))
        if self.se is not None and options.gate_at == "after_norm":
            y = self.se(y)
        y = self.conv3(y)
        return shortcut + noise.drop_path(y, drop_path, train=train, key=key)
