"""Dense attention on TPUs by JAX's splash attention, which keeps no map.

Its public interface hands out no results to differentiate from, so the backward pass runs the forward kernel again.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LEAST_TOKENS = 1536
"""From here on it wins forward and backward, by the compiler's cycles for v5e (`benchmarks/dense_tpu.py`)."""

_BLOCKS = (1024, 512)


def unprofitable(q: Any, k: Any, v: Any, *, beside: tuple[str, ...]) -> str | None:
    """Why these arguments are faster by XLA; None: they are not."""
    tokens = min(q.shape[1], k.shape[1])
    return f"below {LEAST_TOKENS} tokens xla is faster, and here are {tokens}" if tokens < LEAST_TOKENS else None


def refuse(q: Any, k: Any, v: Any, *, beside: tuple[str, ...]) -> str | None:
    """Why these arguments cannot be had; None: they can."""
    if beside:
        return f"has no {' and no '.join(beside)}"
    if {array.dtype.name for array in (q, k, v)} != {"bfloat16"}:
        return "is for bfloat16: it multiplies float32 in less than full precision"
    if any(array.shape[-1] > 128 and array.shape[-1] % 128 for array in (q, v)):
        return "head dims above 128 must be multiples of 128"
    return None


def forward(
    q: Float[Array, "B N H D"], k: Float[Array, "B M H D"], v: Float[Array, "B M H E"], *, scale: float
) -> tuple[Float[Array, "B N H E"]]:
    """The output."""
    return (_attend(q, k, v, scale),)


def backward(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M H D"],
    v: Float[Array, "B M H E"],
    d_out: Float[Array, "B N H E"],
    *,
    scale: float,
) -> tuple[Float[Array, "B N H D"], Float[Array, "B M H D"], Float[Array, "B M H E"]]:
    """Gradients of q, k, v."""
    return jax.vjp(functools.partial(_attend, scale=scale), q, k, v)[1](d_out)


def _attend(q: Array, k: Array, v: Array, scale: float) -> Array:
    # Kernels for TPUs are imported where they are used: it takes a second.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    queries, keys = q.shape[1], k.shape[1]
    # The kernel takes whole blocks, and scaled queries. Keys that fill up a block are of another segment.
    fill_queries, fill_keys = -queries % _BLOCKS[-1], -keys % _BLOCKS[-1]
    q, k, v = (
        jnp.pad(jnp.swapaxes(array, 1, 2), ((0, 0), (0, 0), (0, fill), (0, 0)))
        for array, fill in ((q * scale, fill_queries), (k, fill_keys), (v, fill_keys))
    )
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
    )
    run = functools.partial(kernel, segment_ids=segments if fill_keys else None)
    return jnp.swapaxes(jax.vmap(run)(q, k, v), 1, 2)[:, :queries]
