"""Attention as pure functions on arrays, heads last: `[B, N, H, D]`. Modules with parameters live in `models/`."""

from attn.dense import Hook, dense_attention
from attn.grid import Grid
from attn.halo import halo_attention
from attn.implementation import explain, fallback
from attn.merge import merge_attention
from attn.neighborhood import neighborhood_attention
from attn.outlook import outlook_attention
from attn.positions import RESAMPLE_METHODS, resample_positions, sincos_2d
from attn.probabilities import probabilities
from attn.relative_logits import bottleneck_attention
from attn.routing import bilevel_routing_attention, routed_attention

__all__ = [
    "RESAMPLE_METHODS",
    "Grid",
    "Hook",
    "bilevel_routing_attention",
    "bottleneck_attention",
    "dense_attention",
    "explain",
    "fallback",
    "halo_attention",
    "merge_attention",
    "neighborhood_attention",
    "outlook_attention",
    "probabilities",
    "resample_positions",
    "routed_attention",
    "sincos_2d",
]
