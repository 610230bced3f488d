"""Attention as pure functions on arrays, heads last: `[B, N, H, D]`. Modules with parameters live in `models/`."""

from attn.dense import Hook, dense_attention
from attn.grid import Grid
from attn.implementation import explain, fallback
from attn.merge import merge_attention
from attn.neighborhood import neighborhood_attention
from attn.positions import RESAMPLE_METHODS, resample_positions, sincos_2d
from attn.probabilities import probabilities

__all__ = [
    "RESAMPLE_METHODS",
    "Grid",
    "Hook",
    "dense_attention",
    "explain",
    "fallback",
    "merge_attention",
    "neighborhood_attention",
    "probabilities",
    "resample_positions",
    "sincos_2d",
]
