"""Dense attention on TPUs by JAX's splash attention, which keeps no map.

Its public interface hands out no results to differentiate from, so the backward pass runs the forward kernel again.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from attn.dense import xla

LEAST_TOKENS = 1536
"""From here on it wins forward and backward, by the compiler's cycles for v5e (`benchmarks/dense_tpu.py`)."""

_BLOCKS = (1024, 512)
_LANES = 128


def unprofitable(q: Any, k: Any, v: Any, *, with_lse: bool) -> str | None:
    """Why these arguments are faster by XLA; None: they are not."""
    tokens = min(q.shape[1], k.shape[1])
    return f"below {LEAST_TOKENS} tokens xla is faster, and here are {tokens}" if tokens < LEAST_TOKENS else None


def refuse(q: Any, k: Any, v: Any, *, with_lse: bool) -> str | None:
    """Why these arguments cannot be had; None: they can."""
    if {array.dtype.name for array in (q, k, v)} != {"bfloat16"}:
        return "is for bfloat16: it multiplies float32 in less than full precision"
    if any(array.shape[-1] > _LANES and array.shape[-1] % _LANES for array in (q, v)):
        return f"head dims above {_LANES} must be multiples of {_LANES}"
    return None


def forward(q: Array, k: Array, v: Array, *, scale: float, with_lse: bool) -> tuple[Array, ...]:
    """Output and logsumexp."""
    found = _attend(q, k, v, scale, with_lse)
    return found if with_lse else (found,)


def backward(
    q: Array, k: Array, v: Array, *cotangents: Any, scale: float, with_lse: bool
) -> tuple[Array, Array, Array]:
    """Gradients of q, k, v; those of a logsumexp by XLA."""
    if with_lse:
        return xla.backward(q, k, v, *cotangents, scale=scale, with_lse=with_lse)
    return jax.vjp(functools.partial(_attend, scale=scale, with_lse=False), q, k, v)[1](cotangents[0])


def _attend(q: Array, k: Array, v: Array, scale: float, with_lse: bool) -> Any:
    # Kernels for TPUs are imported where they are used: it takes a second.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    queries, keys = q.shape[1], k.shape[1]
    q, k = _scaled(q, k, scale)
    # The kernel takes whole blocks. Keys that fill up a block are of another segment.
    fill_queries, fill_keys = -queries % _BLOCKS[-1], -keys % _BLOCKS[-1]
    q, k, v = (
        jnp.pad(jnp.swapaxes(array, 1, 2), ((0, 0), (0, 0), (0, fill), (0, 0)))
        for array, fill in ((q, fill_queries), (k, fill_keys), (v, fill_keys))
    )
    k, v = (xla.repeated(array, q.shape[1]) for array in (k, v))
    filled = q.shape[2], k.shape[2]
    segments = splash.SegmentIds(jnp.zeros(filled[0], jnp.int32), (jnp.arange(filled[1]) >= keys).astype(jnp.int32))
    block_q, block_kv = (next(block for block in _BLOCKS if size % block == 0) for size in filled)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.FullMask(filled)] * q.shape[1]),
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_kv_compute=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_kv_dkv_compute=block_kv,
            use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=1,
        save_residuals=with_lse,
    )
    run = functools.partial(kernel, segment_ids=segments if fill_keys else None)
    found = jax.vmap(run)(q, k, v)
    out, lse = (found[0], found[1][0]) if with_lse else (found, None)
    out = jnp.swapaxes(out, 1, 2)[:, :queries]
    return out if lse is None else (out, jnp.swapaxes(lse, 1, 2)[:, :queries].astype(jnp.float32))


def _scaled(q: Array, k: Array, scale: float) -> tuple[Array, Array]:
    """Queries and keys whose product is scaled, which the kernel does not do, with no more rounding than theirs.

    A power of two changes no digit of a query. What is left of another scale is given to queries in two parts, the
    number and what rounding takes from it, side by side as a head dim twice as long, which is free up to 128.
    """
    if abs(math.frexp(scale)[0]) == 0.5 or 2 * q.shape[-1] > _LANES:
        return q * scale, k
    wide = q.astype(jnp.float32) * scale
    high = wide.astype(q.dtype)
    low = (wide - high.astype(jnp.float32)).astype(q.dtype)
    return jnp.concatenate([high, low], -1), jnp.concatenate([k, k], -1)
