"""Self-attention of queries, keys and values in one array, as a fused projection leaves them.

The same operator as `dense_attention` with the same implementations; what takes heads apart is given them apart. On a
TPU taking them apart is a copy, and so is putting their gradients together.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attn.core.arguments import check_rank, usable_scale
from attn.core.operator import Implementation, Operator
from attn.core.shards import Layout
from attn.dense.api import DENSE


@dataclasses.dataclass(frozen=True)
class Settings:
    """What of a call is no array."""

    heads: int
    scale: float

    @property
    def about(self) -> str:
        """As text."""
        return f"{self.heads} heads in one array"


@dataclasses.dataclass(frozen=True)
class ApartImplementation(Implementation):
    """One of `DENSE`, given queries, keys and values apart."""

    def load(self) -> Any:
        """What a module is for others."""
        return _apart(self.module)


@functools.cache
def _apart(module: str) -> Apart:
    return Apart(Implementation("", module).load())


class Apart:
    """An implementation of dense attention for a packed projection."""

    def __init__(self, module: Any):
        self._module = module
        for name in ("refuse", "unprofitable"):
            if hasattr(module, name):
                setattr(self, name, functools.partial(self._asked, getattr(module, name)))
        if hasattr(module, "unavailable"):
            self.unavailable = module.unavailable

    def _asked(self, question: Any, qkv: Any, bias: Any, *, heads: int) -> str | None:
        one = jax.ShapeDtypeStruct((*qkv.shape[:2], heads, qkv.shape[2] // 3 // heads), qkv.dtype)
        return question(one, one, one, with_lse=False)

    def forward(self, qkv: Array, bias: Array | None, *, heads: int, scale: float) -> tuple[Array]:
        """The output."""
        out = self._module.forward(*apart(qkv, bias, heads), scale=scale, with_lse=False)[0]
        return (out.reshape(*qkv.shape[:2], -1),)

    def backward(self, qkv: Array, bias: Array | None, d_out: Array, *, heads: int, scale: float) -> tuple[Array, ...]:
        """Gradients of the projection and, where there is one, of its bias."""
        q, k, v = apart(qkv, bias, heads)
        found = self._module.backward(q, k, v, d_out.reshape(q.shape), scale=scale, with_lse=False)
        d_qkv = jnp.stack(found, axis=2).reshape(qkv.shape)
        return (d_qkv,) if bias is None else (d_qkv, jnp.sum(d_qkv, axis=(0, 1)).astype(bias.dtype))


def apart(qkv: Float[Array, "B N I"], bias: Float[Array, " I"] | None, heads: int) -> tuple[Array, Array, Array]:
    """Queries, keys and values `[B, N, H, D]`."""
    parts = (qkv if bias is None else qkv + bias.astype(qkv.dtype)).reshape(*qkv.shape[:2], 3, heads, -1)
    return parts[:, :, 0], parts[:, :, 1], parts[:, :, 2]


def _plain(qkv: Array, bias: Array | None, *, heads: int, scale: float) -> tuple[Array]:
    return _apart("attn.dense.xla").forward(qkv, bias, heads=heads, scale=scale)


def _implementations() -> tuple[Implementation, ...]:
    """Those of `DENSE`, and before the kernel for heads apart the one that reads them where they lie."""
    found: list[Implementation] = []
    for one in DENSE.implementations:
        if one.name == "tpu":
            found.append(Implementation("tpu_packed", "kernels.dense.tpu_packed", platforms=one.platforms))
        found.append(ApartImplementation(one.name, one.module, one.platforms, one.plain))
    return tuple(found)


_TOKENS: Layout = ("batch", None, None)

PACKED = Operator(
    DENSE.name,
    _implementations(),
    layouts=lambda settings, qkv, bias: ([_TOKENS, None if bias is None else (None,)], [_TOKENS]),
    results=lambda settings, qkv, bias: (jax.ShapeDtypeStruct((*qkv.shape[:2], qkv.shape[2] // 3), qkv.dtype),),
    decisive=("heads",),
    keeps_results=False,
    keeps_maps=True,
    keys=0,
)


def packed_attention(
    qkv: Float[Array, "B N I"],
    bias: Float[Array, " I"] | None = None,
    *,
    heads: int,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B N J"]:
    """`dense_attention` of the parts of a fused projection, `[q, k, v]` with I = 3 * H * D; J = H * D.

    Args:
      bias: of the projection, if it is still to be added. On a TPU its gradient, a sum over all tokens, then comes from
        the kernel that has the tokens' gradients on the chip; by XLA it takes as long as the kernel.
      heads: H.
      scale: of the logits, a number; `D ** -0.5` unless given.
      implementation: those of `dense_attention`, and `"tpu_packed"`, the kernel that reads the array where it lies.

    Raises:
      ValueError: no such array or number of heads; an unknown implementation, or one that refuses.
    """
    check_rank((3,), "batch, tokens, queries and keys and values of all heads", qkv=qkv)
    if not isinstance(heads, int) or heads < 1 or qkv.shape[2] % (3 * heads):
        raise ValueError(f"heads={heads!r}: an array of {qkv.shape[2]} channels is not 3 parts of so many heads")
    if bias is not None and bias.shape != qkv.shape[2:]:
        raise ValueError(f"bias of shape {bias.shape}: of the projection to {qkv.shape[2]} channels, {qkv.shape[2:]}")
    depth = qkv.shape[2] // 3 // heads
    settings = Settings(heads, usable_scale(scale, depth))
    return PACKED.run((qkv, bias), settings, plain=_plain, implementation=implementation)[0]
