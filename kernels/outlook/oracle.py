"""Outlook attention by its definition: NumPy, float64, one window after the other over its explicit places.

What the kernels are compared with. Arguments and results are those of an implementation (`attn/outlook/api.py`), as
float64 arrays (VOLO, arXiv:2106.13112, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

Weights = Float[np.ndarray, "B V U H O I"]
Map = Float[np.ndarray, "B Y X H D"]
Padded = Float[np.ndarray, "B P Q H D"]


def forward(logits: Weights, v: Map, *, window: int, stride: int, scale: float) -> tuple[Map]:
    """The output."""
    values, out = _padded(v, window), np.zeros(_padded(v, window).shape)
    for at, here in _windows(logits, window, stride):
        probs = _softmax(logits[at], scale)
        out[here] += _as_map(np.einsum("hoi,ihd->ohd", probs, _places(values[here])), window)
    return (_cropped(out, v.shape, window),)


def backward(logits: Weights, v: Map, d_out: Map, *, window: int, stride: int, scale: float) -> tuple[Weights, Map]:
    """Gradients of logits and values."""
    values, cotangents = _padded(v, window), _padded(d_out, window)
    d_logits, d_values = np.zeros(logits.shape), np.zeros(values.shape)
    for at, here in _windows(logits, window, stride):
        probs, d_mixed = _softmax(logits[at], scale), _places(cotangents[here])
        d_probs = np.einsum("ohd,ihd->hoi", d_mixed, _places(values[here]))
        d_logits[at] = scale * probs * (d_probs - (probs * d_probs).sum(-1, keepdims=True))
        d_values[here] += _as_map(np.einsum("hoi,ohd->ihd", probs, d_mixed), window)
    return d_logits, _cropped(d_values, v.shape, window)


def _windows(logits: Weights, window: int, stride: int) -> Iterator[tuple]:
    """Of every window: where its logits are, and where its places are on the padded map."""
    for example, row, column in np.ndindex(logits.shape[:3]):
        sides = (slice(n * stride, n * stride + window) for n in (row, column))
        yield (example, row, column), (example, *sides)


def _softmax(logits: Float[np.ndarray, "H O I"], scale: float) -> Float[np.ndarray, "H O I"]:
    scaled = scale * np.asarray(logits, np.float64)
    weights = np.exp(scaled - scaled.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _padded(x: Map, window: int) -> Padded:
    """With zeros all around, as many as windows can reach."""
    return np.pad(np.asarray(x, np.float64), [(0, 0), (window // 2, window), (window // 2, window), (0, 0), (0, 0)])


def _cropped(x: Padded, shape: tuple[int, ...], window: int) -> Map:
    return x[:, window // 2 : window // 2 + shape[1], window // 2 : window // 2 + shape[2]]


def _places(x: Float[np.ndarray, "K L H D"]) -> Float[np.ndarray, "I H D"]:
    return x.reshape(-1, *x.shape[2:])


def _as_map(x: Float[np.ndarray, "I H D"], window: int) -> Float[np.ndarray, "K L H D"]:
    return x.reshape(window, window, *x.shape[1:])
