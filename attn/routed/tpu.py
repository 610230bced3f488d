"""Routed attention on TPUs by the kernels of `kernels/routed`; gradients of a logsumexp are XLA's."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array

from attn.routed import xla
from kernels.routed import tpu
from kernels.routed.tpu import forward, refuse

__all__ = ["backward", "forward", "refuse"]


def backward(*arrays: Any, **settings: Any) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v; the kernels compute the probabilities again and take no cotangent of the logsumexp."""
    *others, d_lse = arrays
    return tpu.backward(*others, **settings) if d_lse is None else xla.backward(*arrays, **settings)
