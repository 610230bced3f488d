"""The forward kernel for GPUs: a tile of queries, the keys of its box streamed past it, softmax on the way.

One pass over the keys with a running maximum (FlashAttention-2, arXiv:2307.08691, algorithm 1), in base 2. Extra keys
come first, as visitors that everybody sees. A key that a query does not see has probability exactly zero.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float

from kernels.neighborhood import gpu_program, gpu_tiles
from kernels.neighborhood.gpu_choice import Tile
from kernels.neighborhood.pattern import Pattern

LOG2_E = math.log2(math.e)


def forward(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N K D"],
    v: Float[Array, "B N K E"],
    bias: Float[Array, "H T"] | None,
    extra_keys: Float[Array, "B M K D"] | None,
    extra_values: Float[Array, "B M K E"] | None,
    *,
    pattern: Pattern,
    scale: float,
    tile: Tile,
    interpret: bool,
) -> tuple[Float[Array, "B N H E"], Float[Array, "B N H"]]:
    """Output and logsumexp (natural), tokens in row-major order; T enumerates relative positions."""
    batch, tokens, heads, _ = q.shape
    tiling = gpu_tiles.make_tiling(pattern, tile.extents)
    inputs = {
        "tables": jnp.asarray(tiling.tables),
        "q": q,
        "k": k,
        "v": v,
        "bias": bias,
        "extra_keys": extra_keys,
        "extra_values": extra_values,
    }
    out, lse = pl.pallas_call(
        functools.partial(neighborhood_forward, pattern=pattern, tiling=tiling, scale=scale, width=tile.visitors),
        out_shape=(
            jax.ShapeDtypeStruct((batch, tokens, heads, v.shape[-1]), v.dtype),
            jax.ShapeDtypeStruct((batch, tokens, heads), jnp.float32),
        ),
        grid=(batch * tiling.tiles * heads,),
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="neighborhood_forward",
    )(inputs)
    return out, lse


def neighborhood_forward(
    refs: dict[str, Any], out: Any, lse: Any, *, pattern: Pattern, tiling: gpu_tiles.Tiling, scale: float, width: int
) -> None:
    """The kernel: one program is one tile of queries of one head."""
    heads, kv_heads = refs["q"].shape[2], refs["k"].shape[2]
    batch, tile, head = gpu_program.place(pl.program_id(0), tiling.tiles, heads)
    kv_head = lax.div(head, heads // kv_heads)
    queries = gpu_program.residents(tiling, refs["tables"], tile)
    q = gpu_program.gather(refs["q"], batch, queries.tokens, head, queries.valid)

    def update(carry: Any, k: Array, v: Array, mask: Bool[Array, "R V"], bias: Any) -> Any:
        maximum, total, out = carry
        logits = gpu_program.product(q, k, contract=(1, 1)) * (scale * LOG2_E) + bias * LOG2_E
        logits = jnp.where(mask, logits, -jnp.inf)
        higher = jnp.maximum(maximum, jnp.max(logits, axis=1))
        probs = jnp.exp2(logits - higher[:, None])
        keep = jnp.exp2(maximum - higher)
        total = total * keep + jnp.sum(probs, axis=1)
        return higher, total, out * keep[:, None] + gpu_program.product(probs.astype(v.dtype), v)

    def extra_step(step: Any, carry: Any) -> Any:
        count = refs["extra_keys"].shape[1]
        index = step * width + jnp.arange(width, dtype=jnp.int32)
        valid = index < count
        k = gpu_program.gather(refs["extra_keys"], batch, index, kv_head, valid)
        v = gpu_program.gather(refs["extra_values"], batch, index, kv_head, valid)
        return update(carry, k, v, valid[None, :], 0.0)

    def step(step: Any, carry: Any) -> Any:
        keys = gpu_program.visitors(tiling, queries, step, width)
        k = gpu_program.gather(refs["k"], batch, keys.tokens, kv_head, keys.valid)
        v = gpu_program.gather(refs["v"], batch, keys.tokens, kv_head, keys.valid)
        mask = gpu_program.meets(queries, keys)
        return update(carry, k, v, mask, gpu_program.look_up(refs["bias"], head, pattern, queries, keys, mask))

    lowest = float(jnp.finfo(jnp.float32).min)  # not minus infinity: a row that saw nothing yet must not become NaN
    carry = (
        jnp.full(tiling.rows, lowest, jnp.float32),
        jnp.zeros(tiling.rows, jnp.float32),
        jnp.zeros((tiling.rows, gpu_tiles.filled(refs["v"].shape[-1])), jnp.float32),
    )
    if refs["extra_keys"] is not None:
        carry = lax.fori_loop(0, pl.cdiv(refs["extra_keys"].shape[1], width), extra_step, carry)
    maximum, total, sums = lax.fori_loop(0, tiling.steps(width), step, carry)
    gpu_program.scatter(out, batch, queries.tokens, head, queries.valid, sums / total[:, None])
    gpu_program.scatter_numbers(lse, batch, queries.tokens, head, queries.valid, (maximum + jnp.log2(total)) / LOG2_E)
