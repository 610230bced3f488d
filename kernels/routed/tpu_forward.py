"""The forward kernel of routed attention for TPUs (Pallas Mosaic).

Keys and values of an example stay on the chip, sorted by region, and a region's queries read those that they are routed
to there: what is gathered never exists in main memory. All keys of a query are in one block, so the softmax needs no
running maximum. Logits lie as `[keys, queries]`: reductions over keys run down the sublanes, and the queries of several
heads and regions fill the lanes.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.routed.tpu_blocks import Refs, blocks, by_head, by_region, call, parts, product
from kernels.routed.tpu_plan import Plan
from kernels.routed.tpu_regions import side_by_side, sort_by_place, sort_by_region

LOG2E = 1 / math.log(2)


def forward(plan: Plan, q: Any, k: Any, v: Any, indices: Any, *, scale: float, vmem: int) -> tuple[Any, list[Any]]:
    """Output `[B, Y, X, H * D]`, and by part the logsumexp `[B, block, columns of the block]`."""
    outputs = {"out": jax.ShapeDtypeStruct(q.shape, v.dtype)}
    for number, part in enumerate(plan.parts):
        size = plan.block(part)
        shape = (q.shape[0], plan.padded // size, size * plan.columns(part))
        outputs[f"lse{number}"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    scratch = by_head(plan, "queries", q.dtype) | by_region(plan, "sums", jnp.float32, plan.padded)
    scratch |= by_region(plan, "keys", k.dtype, plan.count) | by_region(plan, "values", v.dtype, plan.count)
    found = call(
        functools.partial(_kernel, plan, scale),
        {"q": q, "k": k, "v": v},
        indices,
        outputs,
        scratch,
        vmem=vmem,
        name="routed_attention_forward",
    )
    return found["out"], parts(plan, found, "lse")


def _kernel(plan: Plan, scale: float, refs: Refs) -> None:
    sort_by_region(plan, refs["q"], parts(plan, refs, "queries"), by_head=True)
    sort_by_region(plan, refs["k"], parts(plan, refs, "keys"))
    sort_by_region(plan, refs["v"], parts(plan, refs, "values"))
    jax.lax.fori_loop(0, plan.passes, functools.partial(_pass, plan, scale, refs), 0)
    sort_by_place(plan, parts(plan, refs, "sums"), refs["out"])


def _pass(plan: Plan, scale: float, refs: Refs, index: Any, _: Any) -> Any:
    work = list(blocks(plan, refs, index))
    # One phase after the other over all blocks, rather than block by block: the compiler then overlaps the blocks.
    logits = [block.against_keys("keys", block.queries("queries")) * (scale * LOG2E) for block in work]
    results = [softmax(one) for one in logits]
    turned = [probs.T.astype(refs["v"].dtype) for probs, _ in results]
    for block, (_, lse), probs in zip(work, results, turned, strict=True):
        for region, rows in zip(block.regions, block.split(probs), strict=True):
            heads = product(rows, block.keys("values", region))
            block.of("sums")[region] = side_by_side(plan, block.part, heads)
        block.of("lse")[0, pl.ds(block.index, 1)] = lse / LOG2E
    return 0


def softmax(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Probabilities over the rows, and the logarithm of their sum `[1, columns]`; logits in units of log(2)."""
    largest = jnp.max(logits, axis=0, keepdims=True)
    probs = jnp.exp2(logits - largest)
    total = jnp.sum(probs, axis=0, keepdims=True)
    return probs * (1 / total), largest + jnp.log2(total)
