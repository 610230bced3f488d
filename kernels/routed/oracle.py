"""Routed attention by its definition: NumPy, float64, one region of queries after the other over its explicit keys.

What the kernels are compared with. Arguments and results are those of an implementation (`attn/routed/api.py`), as
float64
arrays: softmax attention of every query to all places of the regions that its own region is routed to (BiFormer,
arXiv:2303.08810, section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

Numbers = Float[np.ndarray, "..."]
Tokens = Int[np.ndarray, " T"]


def forward(
    q: Numbers, k: Numbers, v: Numbers, indices: Int[np.ndarray, "B R K"], *, regions: tuple[int, int], scale: float
) -> tuple[Numbers, Numbers]:
    """`out [B, Y, X, H, D]` and `lse [B, Y, X, H]`."""
    queries, keys, values = (_tokens(x) for x in (q, k, v))
    out, lse = np.zeros(queries.shape), np.zeros(queries.shape[:-1])
    for example, own, seen in _sets(q.shape[1:3], indices, regions):
        logits = scale * np.einsum("qhd,khd->hqk", queries[example, own], keys[example, seen])
        largest = logits.max(axis=-1, keepdims=True)
        weights = np.exp(logits - largest)
        total = weights.sum(axis=-1, keepdims=True)
        lse[example, own] = (largest + np.log(total))[..., 0].T
        out[example, own] = np.einsum("hqk,khd->qhd", weights / total, values[example, seen])
    return out.reshape(q.shape), lse.reshape(q.shape[:-1])


def backward(
    q: Numbers,
    k: Numbers,
    v: Numbers,
    indices: Int[np.ndarray, "B R K"],
    out: Numbers,
    lse: Numbers,
    d_out: Numbers,
    *,
    regions: tuple[int, int],
    scale: float,
) -> tuple[Numbers, Numbers, Numbers]:
    """Gradients of q, k and v."""
    queries, keys, values, outs, d_outs = (_tokens(x) for x in (q, k, v, out, d_out))
    lses = np.asarray(lse, np.float64).reshape(queries.shape[:-1])
    d_queries, d_keys, d_values = (np.zeros(x.shape) for x in (queries, keys, values))
    for example, own, seen in _sets(q.shape[1:3], indices, regions):
        logits = scale * np.einsum("qhd,khd->hqk", queries[example, own], keys[example, seen])
        probs = np.exp(logits - lses[example, own].T[..., None])
        d_probs = np.einsum("qhd,khd->hqk", d_outs[example, own], values[example, seen])
        delta = (outs[example, own] * d_outs[example, own]).sum(axis=-1).T
        d_logits = scale * probs * (d_probs - delta[..., None])
        d_queries[example, own] = np.einsum("hqk,khd->qhd", d_logits, keys[example, seen])
        # Added one after the other: a region that is named twice has its places twice among the keys.
        np.add.at(d_keys[example], seen, np.einsum("hqk,qhd->khd", d_logits, queries[example, own]))
        np.add.at(d_values[example], seen, np.einsum("hqk,qhd->khd", probs, d_outs[example, own]))
    return d_queries.reshape(q.shape), d_keys.reshape(k.shape), d_values.reshape(v.shape)


def _sets(
    shape: tuple[int, ...], indices: Int[np.ndarray, "B R K"], regions: tuple[int, int]
) -> Iterator[tuple[int, Tokens, Tokens]]:
    """For every example and region: its number, the places of the region, and the places that they see."""
    height, width = (side // count for side, count in zip(shape, regions, strict=True))
    places = np.arange(shape[0] * shape[1]).reshape(shape)
    members = [
        places[row * height : (row + 1) * height, column * width : (column + 1) * width].ravel()
        for row in range(regions[0])
        for column in range(regions[1])
    ]
    for example, routes in enumerate(indices):
        for region, chosen in enumerate(routes):
            yield example, members[region], np.concatenate([members[choice] for choice in chosen])


def _tokens(x: Numbers) -> Float[np.ndarray, "B N H D"]:
    """Float64, one axis of places."""
    return np.asarray(x, np.float64).reshape(x.shape[0], -1, *x.shape[3:])
