"""Tokens to one vector: by their mean or maximum, or by attention of one learned query to all of them."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attn import Hook, dense_attention
from models.init import scheme
from models.layers import DType, LayerNorm, Linear
from models.mlp import Mlp


def _max(x: Float[Array, "B N C"]) -> Float[Array, "B C"]:
    # The derivative of a maximum compares it with its input. Where the compiler computes that input anew and rounds it
    # differently, no entry is equal, and the gradient is 0 / 0.
    return jnp.take_along_axis(x, x.argmax(axis=1, keepdims=True), axis=1)[:, 0]


GLOBAL_POOLS: dict[str, Callable[[Array], Array]] = {
    "avg": lambda x: x.mean(axis=1),
    "max": _max,
    "avgmax": lambda x: (_max(x) + x.mean(axis=1)) / 2,
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
        self.heads = heads
        start = scheme(init)
        self.latent = nnx.Param(start.latent(rngs.params(), (1, 1, width), jnp.float32))
        shared = {"units": (heads, "heads"), "dtype": dtype, "rngs": rngs}
        self.q = Linear(width, width, kernel_init=start.linear, split="out", **shared)
        self.kv = Linear(width, 2 * width, kernel_init=start.qkv, split="parts", **shared)
        self.proj = Linear(width, width, kernel_init=start.linear, split="in", **shared)
        self.norm = None if norm_eps is None else LayerNorm(width, eps=norm_eps, dtype=dtype)
        self.mlp = Mlp(width, mlp_width, activation=activation, dropout=0.0, init=init, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B N C"], *, hook: Hook | None = None) -> Float[Array, "B C"]:
        """Hook sites are those of `dense_attention`, with `layer="pool"`."""
        batch, _, width = x.shape
        latent = jnp.broadcast_to(self.latent[...].astype(x.dtype), (batch, 1, width))
        q = self.q(latent).reshape(batch, 1, self.heads, -1)
        k, v = jnp.moveaxis(self.kv.parts(x, 2, self.heads), 2, 0)
        y = self.proj(dense_attention(q, k, v, hook=hook, layer="pool").reshape(batch, 1, width))
        return (y + self.mlp(y if self.norm is None else self.norm(y)))[:, 0]
