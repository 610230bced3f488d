"""Feed-forward layers of a transformer block."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from models.init import scheme
from models.layers import DType, LayerNorm, Linear, dropout, fold_key


@jax.custom_jvp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x * Phi(x)` with the exact normal distribution function (arXiv:1606.08415), computed in float32."""
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    # By hand, for two reasons: erf is twice as fast as the erfc of jax.nn.gelu, and the derivative is the one array
    # kept for the backward pass, where differentiating the formula keeps four as wide as the hidden layer.
    (x,), (tangent,) = primals, tangents
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * wide * wide) * (2 * math.pi) ** -0.5
    slope = (_normal_cdf(wide) + wide * density).astype(x.dtype)
    return gelu(x), slope * tangent


def _normal_cdf(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The tanh approximation of GELU, the default of Flax, big_vision and SigLIP."""
    return jax.nn.gelu(x, approximate=True)


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x * sigmoid(1.702 x)`, the GELU of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "mish": jax.nn.mish,
    "hard_swish": jax.nn.hard_swish,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}
"""Name -> function on arrays of any shape."""


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

    def __call__(
        self, x: Float[Array, "B N C"], *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> Float[Array, "B N C"]:
        """The key is for dropout."""
        hidden = ACTIVATIONS[self.activation](checkpoint_name(self.fc1(x), "mlp_hidden"))
        hidden = dropout(hidden, self.dropout, train=train, key=fold_key(key, 0))
        hidden = hidden if self.norm is None else self.norm(hidden)
        return dropout(self.fc2(hidden), self.dropout, train=train, key=fold_key(key, 1))


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

    def __call__(
        self, x: Float[Array, "B N C"], *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> Float[Array, "B N C"]:
        """The key is for dropout."""
        both = checkpoint_name(self.fc1.parts(x, 2, self.hidden), "mlp_hidden")[..., 0]
        gate, value = both[..., self.gate, :], both[..., 1 - self.gate, :]
        hidden = ACTIVATIONS[self.activation](gate) * value
        hidden = dropout(hidden, self.dropout, train=train, key=fold_key(key, 0))
        hidden = hidden if self.norm is None else self.norm(hidden)
        return dropout(self.fc2(hidden), self.dropout, train=train, key=fold_key(key, 1))


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
