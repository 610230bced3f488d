"""The backward kernels for GPUs: dQ by tiles of queries; dK and dV by tiles of keys, past which their queries stream.

Probabilities are computed anew from the logsumexp (FlashAttention-2, arXiv:2307.08691, algorithm 2). With
`delta = rowsum(d_out * out) - d_lse`, known before, the gradient of a logit is `prob * (d_out v^T - delta)`; the second
term of delta is all that a cotangent of the logsumexp needs. Each gradient has one owner who sums in a fixed order: no
atomic additions, the same bits every time.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from kernels.neighborhood import gpu_program, gpu_tiles
from kernels.neighborhood.gpu_choice import Tile
from kernels.neighborhood.gpu_forward import LOG2_E
from kernels.neighborhood.pattern import Pattern


def query_gradient(
    inputs: dict[str, Any], *, pattern: Pattern, scale: float, tile: Tile, interpret: bool
) -> Float[Array, "B N H D"]:
    """dQ. `inputs`: q, k, v, bias, extra_keys, extra_values as in the forward pass, and d_out, lse, delta."""
    q = inputs["q"]
    tiling = gpu_tiles.make_tiling(pattern, tile.extents)
    return pl.pallas_call(
        functools.partial(neighborhood_dq, pattern=pattern, tiling=tiling, scale=scale, width=tile.visitors),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(q.shape[0] * tiling.tiles * q.shape[2],),
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="neighborhood_dq",
    )({"tables": jnp.asarray(tiling.tables), **inputs})


def key_gradients(
    inputs: dict[str, Any], *, pattern: Pattern, scale: float, tile: Tile, interpret: bool
) -> tuple[Float[Array, "B N K D"], Float[Array, "B N K E"]]:
    """dK and dV, without extra keys and values. `inputs` as for `query_gradient`."""
    k, v = inputs["k"], inputs["v"]
    tiling = gpu_tiles.make_tiling(pattern, tile.extents, reverse=True)
    dk, dv = pl.pallas_call(
        functools.partial(neighborhood_dkv, pattern=pattern, tiling=tiling, scale=scale, width=tile.visitors),
        out_shape=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        grid=(k.shape[0] * tiling.tiles * k.shape[2],),
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="neighborhood_dkv",
    )({"tables": jnp.asarray(tiling.tables), **inputs})
    return dk, dv


def probabilities(
    rows: Float[Array, "R D"], columns: Float[Array, "V D"], mask: Any, bias: Any, lse: Any, *, scale: float
) -> Float[Array, "R V"]:
    """Of queries and keys, either of them the rows; zero where the mask is. `lse` is broadcast to their places."""
    logits = gpu_program.product(rows, columns, contract=(1, 1)) * (scale * LOG2_E)
    return jnp.where(mask, jnp.exp2(logits + (bias - lse) * LOG2_E), 0)


def neighborhood_dq(
    refs: dict[str, Any], dq: Any, *, pattern: Pattern, tiling: gpu_tiles.Tiling, scale: float, width: int
) -> None:
    """The kernel of dQ: one program is one tile of queries of one head."""
    heads, kv_heads = refs["q"].shape[2], refs["k"].shape[2]
    batch, tile, head = gpu_program.place(pl.program_id(0), tiling.tiles, heads)
    kv_head = lax.div(head, heads // kv_heads)
    queries = gpu_program.residents(tiling, refs["tables"], tile)
    q = gpu_program.gather(refs["q"], batch, queries.tokens, head, queries.valid)
    d_out = gpu_program.gather(refs["d_out"], batch, queries.tokens, head, queries.valid)
    lse = gpu_program.gather_numbers(refs["lse"], batch, queries.tokens, head, queries.valid)[:, None]
    delta = gpu_program.gather_numbers(refs["delta"], batch, queries.tokens, head, queries.valid)[:, None]

    def update(sums: Array, k: Array, v: Array, mask: Any, bias: Any) -> Array:
        probs = probabilities(q, k, mask, bias, lse, scale=scale)
        d_logits = probs * (gpu_program.product(d_out, v, contract=(1, 1)) - delta)
        return sums + gpu_program.product(d_logits.astype(k.dtype), k)

    def extra_step(step: Any, sums: Array) -> Array:
        index = step * width + jnp.arange(width, dtype=jnp.int32)
        valid = index < refs["extra_keys"].shape[1]
        k = gpu_program.gather(refs["extra_keys"], batch, index, kv_head, valid)
        v = gpu_program.gather(refs["extra_values"], batch, index, kv_head, valid)
        return update(sums, k, v, queries.valid[:, None] & valid[None, :], 0.0)

    def step(step: Any, sums: Array) -> Array:
        keys = gpu_program.visitors(tiling, queries, step, width)
        k = gpu_program.gather(refs["k"], batch, keys.tokens, kv_head, keys.valid)
        v = gpu_program.gather(refs["v"], batch, keys.tokens, kv_head, keys.valid)
        mask = gpu_program.meets(queries, keys)
        return update(sums, k, v, mask, gpu_program.look_up(refs["bias"], head, pattern, queries, keys, mask))

    sums = jnp.zeros(q.shape, jnp.float32)
    if refs["extra_keys"] is not None:
        sums = lax.fori_loop(0, pl.cdiv(refs["extra_keys"].shape[1], width), extra_step, sums)
    sums = lax.fori_loop(0, tiling.steps(width), step, sums)
    gpu_program.scatter(dq, batch, queries.tokens, head, queries.valid, sums * scale)


def neighborhood_dkv(
    refs: dict[str, Any], dk: Any, dv: Any, *, pattern: Pattern, tiling: gpu_tiles.Tiling, scale: float, width: int
) -> None:
    """The kernel of dK and dV: one program is one tile of keys of one key head, for all query heads that use it."""
    kv_heads = refs["k"].shape[2]
    sharing = refs["q"].shape[2] // kv_heads
    batch, tile, kv_head = gpu_program.place(pl.program_id(0), tiling.tiles, kv_heads)
    keys = gpu_program.residents(tiling, refs["tables"], tile)
    k = gpu_program.gather(refs["k"], batch, keys.tokens, kv_head, keys.valid)
    v = gpu_program.gather(refs["v"], batch, keys.tokens, kv_head, keys.valid)
    steps = tiling.steps(width)

    def step(number: Any, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        head = kv_head * sharing + lax.div(number, steps)
        queries = gpu_program.visitors(tiling, keys, lax.rem(number, steps), width)
        q = gpu_program.gather(refs["q"], batch, queries.tokens, head, queries.valid)
        d_out = gpu_program.gather(refs["d_out"], batch, queries.tokens, head, queries.valid)
        lse = gpu_program.gather_numbers(refs["lse"], batch, queries.tokens, head, queries.valid)[None, :]
        delta = gpu_program.gather_numbers(refs["delta"], batch, queries.tokens, head, queries.valid)[None, :]
        mask = gpu_program.meets(keys, queries)
        bias = gpu_program.look_up(refs["bias"], head, pattern, keys, queries, mask, reverse=True)
        probs = probabilities(k, q, mask, bias, lse, scale=scale)
        d_logits = probs * (gpu_program.product(v, d_out, contract=(1, 1)) - delta)
        d_keys, d_values = sums
        return (
            d_keys + gpu_program.product(d_logits.astype(q.dtype), q),
            d_values + gpu_program.product(probs.astype(d_out.dtype), d_out),
        )

    sums = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    d_keys, d_values = lax.fori_loop(0, sharing * steps, step, sums)
    gpu_program.scatter(dk, batch, keys.tokens, kv_head, keys.valid, d_keys * scale)
    gpu_program.scatter(dv, batch, keys.tokens, kv_head, keys.valid, d_values)
