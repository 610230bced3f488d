"""Neighborhood attention by its definition: NumPy, float64, one query after the other over its explicit set of keys.

What every other implementation is compared with. Arguments and results are those of an implementation
(docs/neighborhood.md), as float64 arrays: attention over the neighbors and the extra keys of a query with one softmax
(Generalized Neighborhood Attention, arXiv:2504.16922, section 3; the bias is that of arXiv:2204.07143, eq. 2).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from kernels.neighborhood.pattern import Pattern

Numbers = Float[np.ndarray, "..."]
Index = tuple[Any, ...]


def forward(
    q: Numbers,
    k: Numbers,
    v: Numbers,
    bias: Numbers | None,
    extra_keys: Numbers | None,
    extra_values: Numbers | None,
    *,
    pattern: Pattern,
    scale: float,
) -> tuple[Numbers, Numbers]:
    """`out [B, *S, H, E]` and `lse [B, *S, H]`."""
    heads = q.shape[-2]
    queries, keys, values = _tokens(q, heads), _tokens(k, heads), _tokens(v, heads)
    extras, extra_outputs = _extra(extra_keys, k, heads), _extra(extra_values, v, heads)
    out = np.empty((*queries.shape[:-1], values.shape[-1]))
    lse = np.empty(queries.shape[:-1])
    for query, seen, index in _sets(pattern):
        logits = _logits(queries[:, query], keys[:, seen], extras, bias, index, scale)
        largest = logits.max(axis=-1, keepdims=True)
        weights = np.exp(logits - largest)
        total = weights.sum(axis=-1, keepdims=True)
        lse[:, query] = (largest + np.log(total))[..., 0]
        attended = np.concatenate([values[:, seen], extra_outputs], axis=1)
        out[:, query] = np.einsum("bhk,bkhe->bhe", weights / total, attended)
    return out.reshape(*q.shape[:-1], -1), lse.reshape(q.shape[:-1])


def backward(
    q: Numbers,
    k: Numbers,
    v: Numbers,
    bias: Numbers | None,
    extra_keys: Numbers | None,
    extra_values: Numbers | None,
    out: Numbers,
    lse: Numbers,
    d_out: Numbers,
    d_lse: Numbers | None,
    *,
    pattern: Pattern,
    scale: float,
) -> tuple[Numbers, Numbers, Numbers, Numbers | None, Numbers | None, Numbers | None]:
    """Gradients of `q, k, v, bias, extra_keys, extra_values`; those of absent arguments are None."""
    heads, kv_heads = q.shape[-2], k.shape[-2]
    queries, keys, values = _tokens(q, heads), _tokens(k, heads), _tokens(v, heads)
    extras, extra_outputs = _extra(extra_keys, k, heads), _extra(extra_values, v, heads)
    d_outs, lses = _tokens(d_out, heads), np.asarray(lse, np.float64).reshape(queries.shape[:-1])
    # d lse / d logit is the probability too, so a cotangent of lse counts like a smaller rowsum(d_out * out).
    delta = (d_outs * _tokens(out, heads)).sum(axis=-1)
    if d_lse is not None:
        delta = delta - np.asarray(d_lse, np.float64).reshape(delta.shape)
    dq, dk, dv = np.zeros_like(queries), np.zeros_like(keys), np.zeros_like(values)
    d_bias = None if bias is None else np.zeros(bias.shape)
    d_extras, d_extra_outputs = np.zeros_like(extras), np.zeros_like(extra_outputs)
    for query, seen, index in _sets(pattern):
        near = len(seen)
        logits = _logits(queries[:, query], keys[:, seen], extras, bias, index, scale)
        probabilities = np.exp(logits - lses[:, query, :, None])
        attended = np.concatenate([values[:, seen], extra_outputs], axis=1)
        d_probabilities = np.einsum("bhe,bkhe->bhk", d_outs[:, query], attended)
        d_logits = probabilities * (d_probabilities - delta[:, query, :, None])
        all_keys = np.concatenate([keys[:, seen], extras], axis=1)
        dq[:, query] = scale * np.einsum("bhk,bkhd->bhd", d_logits, all_keys)
        d_keys = scale * np.einsum("bhk,bhd->bkhd", d_logits, queries[:, query])
        d_values = np.einsum("bhk,bhe->bkhe", probabilities, d_outs[:, query])
        dk[:, seen] += d_keys[:, :near]
        dv[:, seen] += d_values[:, :near]
        d_extras += d_keys[:, near:]
        d_extra_outputs += d_values[:, near:]
        if d_bias is not None:
            d_bias[index] += d_logits[..., :near].sum(axis=0)

    def per_kv_head(gradient: Numbers, shape: tuple[int, ...]) -> Numbers:
        return gradient.reshape(*gradient.shape[:2], kv_heads, heads // kv_heads, -1).sum(axis=3).reshape(shape)

    return (
        dq.reshape(q.shape),
        per_kv_head(dk, k.shape),
        per_kv_head(dv, v.shape),
        d_bias,
        None if extra_keys is None else per_kv_head(d_extras, extra_keys.shape),
        None if extra_values is None else per_kv_head(d_extra_outputs, extra_values.shape),
    )


def _sets(pattern: Pattern) -> Iterator[tuple[int, Int[np.ndarray, " W"], Index]]:
    """Every query: its flat index, those of its keys, the index of their entries in a table of relative positions."""
    for number, query in enumerate(np.ndindex(pattern.shape)):
        seen = pattern.neighbors(query)
        coordinates = np.unravel_index(seen, pattern.shape)
        relative = (
            key // axis.dilation - index // axis.dilation + axis.window - 1
            for axis, index, key in zip(pattern.axes, query, coordinates, strict=True)
        )
        yield number, seen, (slice(None), *relative)


def _logits(
    query: Numbers, keys: Numbers, extras: Numbers, bias: Numbers | None, index: Index, scale: float
) -> Float[np.ndarray, "B H K"]:
    near = scale * np.einsum("bhd,bkhd->bhk", query, keys)
    if bias is not None:
        near = near + np.asarray(bias, np.float64)[index]
    return np.concatenate([near, scale * np.einsum("bhd,bmhd->bhm", query, extras)], axis=-1)


def _tokens(array: Numbers, heads: int) -> Float[np.ndarray, "B N H D"]:
    """Float64, one axis of tokens, key heads repeated for their query heads."""
    array = np.asarray(array, np.float64)
    flat = array.reshape(array.shape[0], -1, *array.shape[-2:])
    return np.repeat(flat, heads // flat.shape[2], axis=2)


def _extra(extra: Numbers | None, like: Numbers, heads: int) -> Float[np.ndarray, "B M H D"]:
    return _tokens(np.zeros((like.shape[0], 0, *like.shape[-2:])) if extra is None else extra, heads)
