"""Dense attention by its definition: NumPy, float64 (Vaswani et al. 2017, arXiv:1706.03762, eq. 1).

What the kernels are compared with. Arguments and results are those of an implementation (`attn/dense/api.py`).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

Queries = Float[np.ndarray, "B N H D"]
Keys = Float[np.ndarray, "B M H D"]


def forward(q: Queries, k: Keys, v: Keys, *, scale: float) -> tuple[Queries]:
    """The output."""
    return (np.einsum("bhnm,bmhd->bnhd", _probs(q, k, scale), v),)


def backward(q: Queries, k: Keys, v: Keys, d_out: Queries, *, scale: float) -> tuple[Queries, Keys, Keys]:
    """Gradients of q, k and v."""
    probs = _probs(q, k, scale)
    d_probs = np.einsum("bnhd,bmhd->bhnm", d_out, v)
    d_logits = scale * probs * (d_probs - (probs * d_probs).sum(-1, keepdims=True))
    return (
        np.einsum("bhnm,bmhd->bnhd", d_logits, k),
        np.einsum("bhnm,bnhd->bmhd", d_logits, q),
        np.einsum("bhnm,bnhd->bmhd", probs, d_out),
    )


def _probs(q: Queries, k: Keys, scale: float) -> Float[np.ndarray, "B H N M"]:
    logits = scale * np.einsum("bnhd,bmhd->bhnm", q, k)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)
