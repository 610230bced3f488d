"""Feed-forward layers of a transformer block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from models.core.call import Call
from models.core.init import scheme
from models.core.tap import TOKENS
from models.layers.activation import ACTIVATIONS
from models.layers.conv import Conv
from models.layers.drop import dropout
from models.layers.linear import DType, Linear
from models.layers.norm import LayerNorm


class Mlp(nnx.Module):
    """Linear, activation, Linear, with dropout after both.

    Args:
      bias: of the first layer, of the second.
      scale_norm: epsilon of a norm before the second layer; None for no norm.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: str,
        bias: tuple[bool, bool] = (True, True),
        scale_norm: float | None = None,
        dropout: float,
        init: str,
        dtype: DType,
        rngs: nnx.Rngs,
    ):
        self.activation, self.dropout = activation, dropout
        start = scheme(init)
        shared = {"kernel_init": start.linear, "bias_init": start.mlp_bias, "dtype": dtype, "rngs": rngs}
        units = (hidden, "hidden units")
        self.fc1 = Linear(width, hidden, split="out", units=units, use_bias=bias[0], **shared)
        self.norm = None if scale_norm is None else LayerNorm(hidden, eps=scale_norm, dtype=dtype)
        self.fc2 = Linear(hidden, width, split="in", units=units, use_bias=bias[1], **shared)

    def __call__(self, x: Float[Array, "B N C"], call: Call) -> Float[Array, "B N C"]:
        """New tokens."""
        x = call.emit("mlp.in", x, TOKENS)
        hidden = ACTIVATIONS[self.activation](checkpoint_name(self.fc1(x), "mlp_hidden"))
        return _output(self, hidden, call)


class GatedMlp(nnx.Module):
    """Gated linear unit (arXiv:2002.05202), packed: fc1 gives gate and value, then fc2 of `activation(gate) * value`.

    Args:
      hidden: width of gate and of value.
      gate_last: the gate is the second half of what fc1 gives, not the first.
      bias, scale_norm: as in `Mlp`.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: str,
        gate_last: bool = False,
        bias: tuple[bool, bool] = (True, True),
        scale_norm: float | None = None,
        dropout: float,
        init: str,
        dtype: DType,
        rngs: nnx.Rngs,
    ):
        self.activation, self.gate, self.dropout, self.hidden = activation, int(gate_last), dropout, hidden
        start = scheme(init)
        shared = {"kernel_init": start.linear, "bias_init": start.mlp_bias, "dtype": dtype, "rngs": rngs}
        units = (hidden, "hidden units")
        self.fc1 = Linear(width, 2 * hidden, split="parts", units=units, use_bias=bias[0], **shared)
        self.norm = None if scale_norm is None else LayerNorm(hidden, eps=scale_norm, dtype=dtype)
        self.fc2 = Linear(hidden, width, split="in", units=units, use_bias=bias[1], **shared)

    def __call__(self, x: Float[Array, "B N C"], call: Call) -> Float[Array, "B N C"]:
        """New tokens."""
        x = call.emit("mlp.in", x, TOKENS)
        both = checkpoint_name(self.fc1.parts(x, 2, self.hidden), "mlp_hidden")[..., 0]
        gate, value = both[..., self.gate, :], both[..., 1 - self.gate, :]
        return _output(self, ACTIVATIONS[self.activation](gate) * value, call)


def _output(mlp: Mlp | GatedMlp, hidden: Float[Array, "B N F"], call: Call) -> Float[Array, "B N C"]:
    """From hidden units to tokens, with the noise of both layers."""
    hidden = call.emit("mlp.hidden", hidden, TOKENS)
    hidden = dropout(hidden, mlp.dropout, train=call.train, key=call.key_for("hidden"))
    hidden = hidden if mlp.norm is None else mlp.norm(hidden)
    y = dropout(mlp.fc2(hidden), mlp.dropout, train=call.train, key=call.key_for("output"))
    return call.emit("mlp.out", y, TOKENS)


def swiglu(width: int, hidden: int, *, activation: str, **options: Any) -> GatedMlp:
    """The gated layer of DINOv2: SiLU on the first half, whatever activation the model has elsewhere."""
    return GatedMlp(width, hidden, activation="silu", **options)


MLPS: dict[str, Callable[..., nnx.Module]] = {
    "mlp": Mlp,
    "swiglu": swiglu,
    "glu": GatedMlp,
    "glu_last": partial(GatedMlp, gate_last=True),
}
"""Name -> layer, made as `layer(width, hidden, *, activation, bias, scale_norm, dropout, init, dtype, rngs)`."""


class DepthwiseMlp(nnx.Module):
    """Linear, depthwise 3 x 3 convolution, activation, Linear (PVT v2, arXiv:2106.13797)"""

    def __init__(self, width: int, hidden: int, *, activation: str, init: str, dtype: DType, rngs: nnx.Rngs):
        self.activation = activation
        start, shared = scheme(init), {"dtype": dtype, "rngs": rngs}
        units = {"units": (hidden, "hidden units"), "kernel_init": start.linear, **shared}
        self.fc1 = Linear(width, hidden, split="out", **units)
        self.conv = Conv(hidden, hidden, size=3, groups=hidden, kernel_init=start.patch, **shared)
        self.fc2 = Linear(hidden, width, split="in", **units)

    def __call__(self, x: Float[Array, "B N C"], call: Call) -> Float[Array, "B N C"]:
        """On a grid without prefix tokens."""
        y = self.fc1(call.emit("mlp.in", x, TOKENS))
        y = self.conv(y.reshape(y.shape[0], *call.grid.shape, -1)).reshape(y.shape)
        hidden = call.emit("mlp.hidden", ACTIVATIONS[self.activation](y), TOKENS)
        return call.emit("mlp.out", self.fc2(hidden), TOKENS)
