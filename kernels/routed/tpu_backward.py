"""The backward kernel of routed attention for TPUs (Pallas Mosaic): all gradients in one pass over the regions.

A region of queries computes its probabilities again, from all its keys, and knows everything that its queries have a
part in: dQ is written, dK and dV are added to the sums of the regions that it is routed to, which stay on the chip. One
owner adds in one order, so the reverse routing is not needed and a second run gives the same bits. With P the
probabilities, as `[keys, queries]` like all else here,

    dV = P dO,   dS = scale * P * (V dO^T - delta),   dK = dS Q,   dQ = dS^T K,

where delta, `rowsum(dO * O)`, is the sum of `P * (V dO^T)` over the keys, so neither O nor the logsumexp is read.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels.routed.tpu_blocks import Block, Refs, blocks, by_head, by_region, call, parts, product
from kernels.routed.tpu_forward import LOG2E, softmax
from kernels.routed.tpu_plan import Plan
from kernels.routed.tpu_regions import clear, side_by_side, sort_by_place, sort_by_region

SUMS = {"d_q": "d_queries", "d_k": "d_keys", "d_v": "d_values"}
"""The sums on the chip that a gradient comes from."""


def backward(
    plan: Plan, q: Any, k: Any, v: Any, d_out: Any, *, indices: Any, scale: float, vmem: int
) -> tuple[Any, Any, Any]:
    """Gradients of q, k, v, packed as these are."""
    outputs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in (("d_q", q), ("d_k", k), ("d_v", v))}
    scratch = by_head(plan, "queries", q.dtype) | by_head(plan, "d_outs", d_out.dtype)
    scratch |= by_region(plan, "keys", k.dtype, plan.count) | by_region(plan, "values", v.dtype, plan.count)
    for name, sums in SUMS.items():
        scratch |= by_region(plan, sums, jnp.float32, plan.padded if name == "d_q" else plan.count)
    found = call(
        functools.partial(_kernel, plan, scale),
        {"q": q, "k": k, "v": v, "d_out": d_out},
        indices,
        outputs,
        scratch,
        vmem=vmem,
        name="routed_attention_backward",
    )
    return found["d_q"], found["d_k"], found["d_v"]


def _kernel(plan: Plan, scale: float, refs: Refs) -> None:
    sort_by_region(plan, refs["q"], parts(plan, refs, "queries"), by_head=True)
    sort_by_region(plan, refs["d_out"], parts(plan, refs, "d_outs"), by_head=True)
    sort_by_region(plan, refs["k"], parts(plan, refs, "keys"))
    sort_by_region(plan, refs["v"], parts(plan, refs, "values"))
    clear([*parts(plan, refs, "d_keys"), *parts(plan, refs, "d_values")])
    jax.lax.fori_loop(0, plan.passes, functools.partial(_pass, plan, scale, refs), 0)
    for name, sums in SUMS.items():
        sort_by_place(plan, parts(plan, refs, sums), refs[name])


def _pass(plan: Plan, scale: float, refs: Refs, index: Any, _: Any) -> Any:
    work = list(blocks(plan, refs, index))
    narrow = refs["q"].dtype
    # One phase after the other over all blocks, as in the forward pass.
    queries = [block.queries("queries") for block in work]
    d_outs = [block.queries("d_outs") for block in work]
    logits = [block.against_keys("keys", one) * (scale * LOG2E) for block, one in zip(work, queries, strict=True)]
    d_probs = [block.against_keys("values", one) for block, one in zip(work, d_outs, strict=True)]
    probs = [softmax(one)[0] for one in logits]
    d_logits = [_d_logits(one, d_one, scale) for one, d_one in zip(probs, d_probs, strict=True)]
    turned = [one.T.astype(narrow) for one in d_logits]
    for block, d_rows in zip(work, turned, strict=True):
        for region, rows in zip(block.regions, block.split(d_rows), strict=True):
            heads = product(rows, block.keys("keys", region))
            block.of("d_queries")[region] = side_by_side(plan, block.part, heads)
    for number, block in enumerate(work):
        _add(block, "d_values", probs[number].astype(narrow), d_outs[number])
        _add(block, "d_keys", d_logits[number].astype(narrow), queries[number])
    return 0


def _d_logits(probs: jax.Array, d_probs: jax.Array, scale: float) -> jax.Array:
    products = probs * d_probs
    return (products - probs * jnp.sum(products, axis=0, keepdims=True)) * scale


def _add(block: Block, name: str, left: jax.Array, right: jax.Array) -> None:
    """Adds `left right`, of each region by itself, to the regions that it is routed to."""
    tokens, target = block.plan.tokens, block.of(name)
    for region, columns, rows in zip(block.regions, block.split(left, axis=1), block.split(right), strict=True):
        sums = product(columns, rows)
        for choice, routed in enumerate(block.routes(region)):
            # Regions may be named more than once: each addition sees the one before.
            target[routed] = target[routed] + sums[choice * tokens : (choice + 1) * tokens]
