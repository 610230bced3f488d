"""The gradients of extra keys and values on GPUs: every query sees them, so each sums over the whole map.

The queries are cut into shares, one program adds up one share in order, and the shares are added outside.
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

from kernels.neighborhood import gpu_program
from kernels.neighborhood.gpu_backward import probabilities
from kernels.neighborhood.gpu_choice import Tile

SHARE = 1024
"""Queries that one program adds up: long enough to hide its start, short enough that one example fills a GPU."""
ROWS = 16
"""Extra keys of one program; a matrix product has no fewer rows."""


def extra_gradients(
    inputs: dict[str, Any], *, scale: float, tile: Tile, interpret: bool
) -> tuple[Float[Array, "B M K D"], Float[Array, "B M K E"]]:
    """Gradients of extra keys and values. `inputs` as for `gpu_backward.query_gradient`."""
    k, v = inputs["extra_keys"], inputs["extra_values"]
    batch, tokens = inputs["q"].shape[:2]
    shares = pl.cdiv(tokens, SHARE)
    names = ("q", "extra_keys", "extra_values", "d_out", "lse", "delta")
    sums = pl.pallas_call(
        functools.partial(neighborhood_dextra, scale=scale, width=tile.visitors),
        out_shape=tuple(jax.ShapeDtypeStruct((batch * shares, *array.shape[1:]), jnp.float32) for array in (k, v)),
        grid=(batch * shares * pl.cdiv(k.shape[1], ROWS) * k.shape[2],),
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="neighborhood_dextra",
    )({name: inputs[name] for name in names})
    dk, dv = (jnp.sum(array.reshape(batch, shares, *array.shape[1:]), axis=1) for array in sums)
    return dk.astype(k.dtype), dv.astype(v.dtype)


def neighborhood_dextra(refs: dict[str, Any], dk: Any, dv: Any, *, scale: float, width: int) -> None:
    """The kernel: one program is up to 16 extra keys of one key head and one share of the queries."""
    _, count, kv_heads, _ = refs["extra_keys"].shape
    tokens, sharing = refs["q"].shape[1], refs["q"].shape[2] // kv_heads
    shares = pl.cdiv(tokens, SHARE)
    batch, share, tile, kv_head = gpu_program.place(pl.program_id(0), shares, pl.cdiv(count, ROWS), kv_heads)
    rows = tile * ROWS + jnp.arange(ROWS, dtype=jnp.int32)
    inside = rows < count
    k = gpu_program.gather(refs["extra_keys"], batch, rows, kv_head, inside)
    v = gpu_program.gather(refs["extra_values"], batch, rows, kv_head, inside)
    steps = SHARE // width

    def step(number: Any, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        head = kv_head * sharing + lax.div(number, steps)
        queries = share * SHARE + lax.rem(number, steps) * width + jnp.arange(width, dtype=jnp.int32)
        valid = queries < tokens
        q = gpu_program.gather(refs["q"], batch, queries, head, valid)
        d_out = gpu_program.gather(refs["d_out"], batch, queries, head, valid)
        lse = gpu_program.gather_numbers(refs["lse"], batch, queries, head, valid)[None, :]
        delta = gpu_program.gather_numbers(refs["delta"], batch, queries, head, valid)[None, :]
        probs = probabilities(k, q, inside[:, None] & valid[None, :], 0.0, lse, scale=scale)
        d_logits = probs * (gpu_program.product(v, d_out, contract=(1, 1)) - delta)
        d_keys, d_values = sums
        return (
            d_keys + gpu_program.product(d_logits.astype(q.dtype), q),
            d_values + gpu_program.product(probs.astype(d_out.dtype), d_out),
        )

    sums = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    d_keys, d_values = lax.fori_loop(0, sharing * steps, step, sums)
    place = batch * shares + share
    gpu_program.scatter(dk, place, rows, kv_head, inside, d_keys * scale)
    gpu_program.scatter(dv, place, rows, kv_head, inside, d_values)
