"""Coarser maps and vectors: pools of squares of places, means and maxima of all, and attention of one learned query."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from attn import Grid, dense_attention
from models.core.call import Call
from models.core.init import scheme
from models.core.tap import TokenIndex
from models.layers.depthwise import same_pads
from models.layers.linear import DType, Linear, computed
from models.layers.mlp import Mlp
from models.layers.norm import LayerNorm


def _max(x: Float[Array, "B N C"]) -> Float[Array, "B C"]:
    # The derivative of a maximum compares it with its input. Where the compiler computes that input anew and rounds it
    # differently, no entry is equal, and the gradient is 0 / 0.
    return jnp.take_along_axis(x, x.argmax(axis=1, keepdims=True), axis=1)[:, 0]


def _mean_and_max(x: Float[Array, "B N C"]) -> Float[Array, "B C"]:
    # Rounded once: each alone has as many bits as the result.
    return (0.5 * (x.mean(axis=1, dtype=jnp.float32) + _max(x))).astype(x.dtype)


# A mean sums in float32 whatever the tokens are.
GLOBAL_POOLS: dict[str, Callable[[Array], Array]] = {
    "avg": lambda x: x.mean(axis=1),
    "max": _max,
    "avgmax": _mean_and_max,
    "catavgmax": lambda x: jnp.concatenate([x.mean(axis=1), _max(x)], axis=-1),
}
"""Name -> function from tokens `[B, N, C]` to `[B, C]`, or to `[B, 2 C]` for the mean beside the maximum."""


class AttentionPool(nnx.Module):
    """MAP head (Set Transformer, arXiv:1810.00825; big_vision): `y = MHA(latent, x)`, then `y + mlp(norm(y))`.

    `norm_eps=None` leaves the norm out.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp_width: int,
        activation: str,
        norm_eps: float | None,
        init: str = "timm",
        dtype: DType = None,
        rngs: nnx.Rngs,
    ):
        self.heads, self.dtype = heads, computed(dtype)
        start = scheme(init)
        self.latent = nnx.Param(start.latent(rngs.params(), (1, 1, width), jnp.float32))
        shared = {"units": (heads, "heads"), "dtype": dtype, "rngs": rngs}
        self.q = Linear(width, width, kernel_init=start.linear, split="out", **shared)
        self.kv = Linear(width, 2 * width, kernel_init=start.qkv, split="parts", **shared)
        self.proj = Linear(width, width, kernel_init=start.linear, split="in", **shared)
        self.norm = None if norm_eps is None else LayerNorm(width, eps=norm_eps, dtype=dtype)
        self.mlp = Mlp(width, mlp_width, activation=activation, dropout=0.0, init=init, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B N C"], call: Call) -> Float[Array, "B C"]:
        """Sites `q k v logits probs heads`, with one query, and those of the MLP."""
        batch, _, width = x.shape
        latent = jnp.broadcast_to(self.latent[...].astype(self.dtype), (batch, 1, width))
        q = self.q(latent).reshape(batch, 1, self.heads, -1)
        k, v = jnp.moveaxis(self.kv.parts(x, 2, self.heads), 2, 0)
        q = call.emit("q", q, "batch tokens heads dim")
        k, v = (call.emit(name, value, "batch keys heads dim", free=("keys",)) for name, value in (("k", k), ("v", v)))
        index = TokenIndex(np.zeros(1, int), np.arange(x.shape[1]), (Grid((1,) * len(call.grid.shape)), call.grid))
        heads = dense_attention(q, k, v, edit=call.edit("batch heads queries keys", index))
        y = self.proj(call.emit("heads", heads, "batch tokens heads dim").reshape(batch, 1, width))
        return (y + self.mlp(y if self.norm is None else self.norm(y), call.at("mlp")))[:, 0]


POOLS = ("avg2", "avg", "max2", "max")


def pool_half(x: Float[Array, "B Y X C"], kind: str, padding: str) -> Float[Array, "B V U C"]:
    """Mean or maximum of squares of places, every other one along each axis.

    Args:
      kind: one of `POOLS`.
      padding: `"same"`: as many places as a convolution has with it, `ceil(n / 2)`; in a mean places outside count as
        zeros (timm's layer; TensorFlow leaves them out, and maps of even sides have none with 2 x 2). `"centred"`:
        3 x 3 places around every other one, those outside left out; 2 x 2 without padding, so `floor(n / 2)`.
    """
    side = 2 if kind.endswith("2") else 3
    if padding == "same":
        around = same_pads(x.shape[1:3], (side, side), (2, 2))
    else:
        around = ((side // 2, side // 2),) * 2 if side == 3 else ((0, 0),) * 2
    shape, strides, pads = (1, side, side, 1), (1, 2, 2, 1), ((0, 0), *around, (0, 0))
    if kind.startswith("max"):
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, shape, strides, pads)
    if side == 2 and not any(map(any, around)) and not (x.shape[1] % 2 or x.shape[2] % 2):
        batch, rows, columns, width = x.shape
        squares = x.reshape(batch, rows // 2, 2, columns // 2, 2, width)
        return squares.mean((2, 4), dtype=jnp.float32).astype(x.dtype)
    total = jax.lax.reduce_window(x.astype(jnp.float32), 0.0, jax.lax.add, shape, strides, pads)
    if padding == "same":
        return (total / side**2).astype(x.dtype)
    inside = jax.lax.reduce_window(jnp.ones(x.shape[1:3]), 0.0, jax.lax.add, shape[1:3], strides[1:3], pads[1:3])
    return (total / inside[..., None]).astype(x.dtype)


def half(x: Float[Array, "B Y X C"]) -> Float[Array, "B V U C"]:
    """Means of 2 x 2 places, at the border of the map of those that are in it: sides become `ceil(n / 2)`."""
    odd = [(0, side % 2) for side in x.shape[1:3]]
    # A last row that is there twice has the mean of itself.
    x = jnp.pad(x, [(0, 0), *odd, (0, 0)], mode="edge") if x.shape[1] % 2 or x.shape[2] % 2 else x
    return pool_half(x, "avg2", "centred")
