"""Feed-forward layers of a transformer block."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from models.init import scheme
from models.layers import DType, Linear, dropout, fold_key


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


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"gelu": gelu, "gelu_tanh": gelu_tanh}
"""Name -> function on arrays of any shape."""


class Mlp(nnx.Module):
    """Linear, activation, Linear, with dropout after both."""

    def __init__(
        self, width: int, hidden: int, *, activation: str, dropout: float, init: str, dtype: DType, rngs: nnx.Rngs
    ):
        self.activation, self.dropout = activation, dropout
        start = scheme(init)
        shared = {"kernel_init": start.linear, "bias_init": start.mlp_bias, "dtype": dtype, "rngs": rngs}
        self.fc1 = Linear(width, hidden, split="out", units=(hidden, "hidden units"), **shared)
        self.fc2 = Linear(hidden, width, split="in", units=(hidden, "hidden units"), **shared)

    def __call__(
        self, x: Float[Array, "B N C"], *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> Float[Array, "B N C"]:
        """The key is for dropout."""
        hidden = ACTIVATIONS[self.activation](checkpoint_name(self.fc1(x), "mlp_hidden"))
        hidden = dropout(hidden, self.dropout, train=train, key=fold_key(key, 0))
        return dropout(self.fc2(hidden), self.dropout, train=train, key=fold_key(key, 1))


class SwiGLU(nnx.Module):
    """Packed SwiGLU (arXiv:2002.05202) as in DINOv2: fc1 gives `[gate, value]`, then fc2 of `silu(gate) * value`.

    `hidden` is the width of each half.
    """

    def __init__(
        self, width: int, hidden: int, *, activation: str, dropout: float, init: str, dtype: DType, rngs: nnx.Rngs
    ):
        self.dropout, self.hidden = dropout, hidden
        start = scheme(init)
        shared = {"kernel_init": start.linear, "bias_init": start.mlp_bias, "dtype": dtype, "rngs": rngs}
        self.fc1 = Linear(width, 2 * hidden, split="parts", units=(hidden, "hidden units"), **shared)
        self.fc2 = Linear(hidden, width, split="in", units=(hidden, "hidden units"), **shared)

    def __call__(
        self, x: Float[Array, "B N C"], *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> Float[Array, "B N C"]:
        """The key is for dropout."""
        both = checkpoint_name(self.fc1.parts(x, 2, self.hidden), "mlp_hidden")[..., 0]
        gate, value = both[..., 0, :], both[..., 1, :]
        hidden = dropout(jax.nn.silu(gate) * value, self.dropout, train=train, key=fold_key(key, 0))
        return dropout(self.fc2(hidden), self.dropout, train=train, key=fold_key(key, 1))


MLPS: dict[str, Callable[..., nnx.Module]] = {"mlp": Mlp, "swiglu": SwiGLU}
