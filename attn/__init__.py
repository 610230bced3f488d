"""Attention as pure functions on arrays, heads last: `[B, N, H, D]`. Modules with parameters live in `models/`."""

from attn.dense import Hook, dense_attention
from attn.grid import Grid
from attn.merge import merge_attention
from attn.positions import RESAMPLE_METHODS, resample_positions, sincos_2d

__all__ = ["RESAMPLE_METHODS", "Grid", "Hook", "dense_attention", "merge_attention", "resample_positions", "sincos_2d"]
