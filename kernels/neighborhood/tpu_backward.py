"""The backward kernel of neighborhood attention for TPUs (Pallas Mosaic): all gradients in one pass over the tiles.

A tile of queries recomputes its probabilities from the logsumexp and knows everything that its queries have a part in:
dQ is written, dK, dV and the gradient of the bias are added to sums that stay on the chip. So no reverse pattern is
needed, and every product is computed once. With P the probabilities, as `[keys, queries]` like all else here,

    dV = P dO,   dS = P * (V dO^T - delta),   dK = scale * dS Q,   dQ = scale * dS^T K,   d_bias = dS,

where delta is `rowsum(dO * O)` less the cotangent of the logsumexp (FlashAttention-2, arXiv:2307.08691, section 2.3.2).
The first is computed as the sum of `P * (V dO^T)` over the keys, which are all here: O need not be read, nor does its
rounding get into the gradients.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.neighborhood import tpu_bias
from kernels.neighborhood.tiles import BLOCKED
from kernels.neighborhood.tpu_bias import LOG2E
from kernels.neighborhood.tpu_blocks import Blocks
from kernels.neighborhood.tpu_forward import (
    bias_rows,
    head_products,
    head_rows,
    only_head,
    product_precision,
    tile_keys,
    tile_logits,
    tile_queries,
    write_queries,
)
from kernels.neighborhood.tpu_plan import Plan
from kernels.neighborhood.tpu_tile import Place, clear, for_each_tile, key_rows, pack, unpack


def backward(
    blocks: Blocks,
    q: Any,
    k: Any,
    v: Any,
    *,
    extra: Any,
    bias: Any,
    lse: Any,
    d_out: Any,
    d_lse: Any,
    scale: float,
) -> dict[str, Any]:
    """`d_q` like q; `d_k`, `d_v`, `d_extra_keys`, `d_extra_values` by band `[B, band, ...]`, `d_bias` `[band, ...]`.

    The sums over bands are left to the caller. Arguments as in `tpu_forward.forward`; lse and d_lse by tile.
    """
    plan, batch = blocks.plan, blocks.steps(q)
    operands = blocks.operands(q, k, v, extra, bias) | {"d_out": d_out, "d_lse": d_lse}
    operands["lse"] = None if plan.recomputes else lse
    whole = plan.bands == 1
    keys = tuple(layout.keys for layout in plan.layouts)
    partial = jax.ShapeDtypeStruct((batch, plan.bands, *keys, k.shape[-1]), k.dtype if whole else jnp.float32)
    partial = partial if plan.examples == 1 else jax.ShapeDtypeStruct(k.shape, k.dtype)
    outputs = {"d_q": jax.ShapeDtypeStruct(q.shape, q.dtype), "d_k": partial, "d_v": partial}
    if extra is not None:
        rows = jax.ShapeDtypeStruct((batch, plan.bands, plan.extra_rows, k.shape[-1]), jnp.float32)
        outputs |= {"d_extra_keys": rows, "d_extra_values": rows}
    scratch = {name: blocks.key_map() for name in ("k_map", "v_map", "d_k_map", "d_v_map")}
    if bias is not None:
        outputs["d_bias"] = jax.ShapeDtypeStruct((plan.bands, *bias.shape), jnp.float32)
        scratch |= tpu_bias.scratch(plan, backward=True)
    if not plan.is_direct:
        scratch |= {f"{name}_map": blocks.query_map() for name in ("q", "d_out", "d_q")}
    return blocks.call(
        functools.partial(_kernel, plan, scale), operands, outputs, scratch, name="neighborhood_attention_backward"
    )


def _kernel(plan: Plan, scale: float, band: Any, refs: dict[str, Any]) -> None:
    for name in ("k", "v"):
        unpack(plan, refs[name], refs[f"{name}_map"])
        clear(refs[f"d_{name}_map"])
    if not plan.is_direct:
        for name in ("q", "d_out"):
            unpack(plan, refs[name], refs[f"{name}_map"], plan.existing_queries(band))
    if plan.extra:
        for name in ("d_extra_keys", "d_extra_values"):
            refs[name][...] = jnp.zeros_like(refs[name])
    if "d_bias" in refs:

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            tpu_bias.spread(plan, refs)
            refs["d_bias_map"][...] = jnp.zeros_like(refs["d_bias_map"])

    for_each_tile(plan, refs["starts"], band, functools.partial(_tile, plan, scale, refs))
    for name in ("k", "v"):
        pack(plan, refs[f"d_{name}_map"], refs[f"d_{name}"].at[0] if plan.examples == 1 else refs[f"d_{name}"])
    if not plan.is_direct:
        pack(plan, refs["d_q_map"], refs["d_q"])
    if "d_bias" in refs:

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _() -> None:
            tpu_bias.fold(plan, refs)


def _tile(plan: Plan, scale: float, refs: dict[str, Any], place: Place) -> None:
    narrow = refs["q"].dtype
    heads = range(plan.block_heads)
    keys = tile_keys(plan, refs, "k_map", "extra_keys", place)
    values = tile_keys(plan, refs, "v_map", "extra_values", place)
    queries = tile_queries(plan, refs, "q", place)
    d_out = tile_queries(plan, refs, "d_out", place)

    logits = tile_logits(plan, scale, refs, place, keys, queries)
    d_probs = head_products(plan, values, d_out, narrow)
    probs = _probabilities(refs, place, logits)
    products = [probs[head] * d_probs[head] for head in heads]
    delta = [jnp.sum(product, axis=0, keepdims=True) for product in products]
    if "d_lse" in refs:
        d_lse = refs["d_lse"][0, 0, 0, place.index]
        delta = [row - d_lse[head : head + 1] for head, row in enumerate(delta)]
    d_logits = [products[head] - probs[head] * delta[head] for head in heads]
    narrow_probs = [one.astype(narrow) for one in probs]
    narrow_d_logits = [one.astype(narrow) for one in d_logits]

    _add_keys(plan, refs, "d_v_map", "d_extra_values", _packed(plan, narrow_probs, d_out), place)
    d_keys = [scale * part for part in _packed(plan, narrow_d_logits, queries)]
    _add_keys(plan, refs, "d_k_map", "d_extra_keys", d_keys, place)
    turned = [part.T for part in keys]
    d_queries = [
        scale
        * jnp.dot(
            head_rows(plan, turned, head).astype(narrow),
            narrow_d_logits[head],
            preferred_element_type=jnp.float32,
            precision=product_precision(narrow),
        )
        for head in heads
    ]
    write_queries(plan, refs, "d_q", jnp.concatenate(d_queries, axis=0).T, place)
    if "d_bias" in refs:
        run = d_logits[0].shape[0] - plan.extra_rows
        for head in heads:
            indices = bias_rows(plan, head, place)
            size = run // len(indices)
            for number, index in enumerate(indices):
                rows = d_logits[head][number * size : (number + 1) * size]
                refs["d_bias_map"][index] = refs["d_bias_map"][index] + rows


def _probabilities(refs: dict[str, Any], place: Place, logits: list[jax.Array]) -> list[jax.Array]:
    if "lse" in refs:
        lse = refs["lse"][0, 0, 0, place.index] * LOG2E
        return [jnp.exp2(one - lse[head : head + 1]) for head, one in enumerate(logits)]
    # A query that does not exist sees nothing: with this bound its weights are zero.
    largest = [jnp.maximum(jnp.max(one, axis=0, keepdims=True), BLOCKED / 10) for one in logits]
    weights = [jnp.exp2(one - bound) for one, bound in zip(logits, largest, strict=True)]
    total = [jnp.sum(one, axis=0, keepdims=True) for one in weights]
    return [one / jnp.maximum(all_, 0.5) for one, all_ in zip(weights, total, strict=True)]


def _packed(plan: Plan, left: list[jax.Array], right: list[jax.Array]) -> list[jax.Array]:
    """`left_h right_h` of all heads side by side, by part `[keys, lanes]` float32.

    Heads that share lanes are one product over all their queries: each head's right operand has only its own lanes.
    """
    parts: list[Any] = [None] * len(plan.parts)
    for (first, end), heads in plan.together:
        other = right[first] if end - first == 1 else jnp.concatenate(right[first:end], axis=1)
        stacked = jnp.concatenate([only_head(plan, other, first, head) for head in heads], axis=0)
        product = jnp.dot(
            left[heads[0]] if len(heads) == 1 else jnp.concatenate([left[head] for head in heads], axis=1),
            stacked,
            preferred_element_type=jnp.float32,
            precision=product_precision(stacked.dtype),
        )
        for part in range(first, end):
            lo, hi = plan.parts[part]
            piece = product[:, lo - 128 * first : hi - 128 * first]
            parts[part] = piece if parts[part] is None else parts[part] + piece
    return parts


def _add_keys(plan: Plan, refs: dict[str, Any], name: str, extra: str, sums: list[jax.Array], place: Place) -> None:
    """Adds `[keys, lanes]` by part to a map of keys, and the rows behind the box to the extra ones."""
    rows, run = key_rows(plan, place), plan.tiles.axes[2].span
    for part, (lo, hi) in enumerate(plan.parts):
        lanes = pl.ds(0, hi - lo)
        for number, (z, y, x) in enumerate(rows):
            piece = sums[part][number * run : (number + 1) * run]
            refs[name][part, z, y, x, lanes] = refs[name][part, z, y, x, lanes] + piece
        if plan.extra:
            where = (0, 0, slice(None), pl.ds(lo, hi - lo))
            refs[extra][where] = refs[extra][where] + sums[part][len(rows) * run :]
