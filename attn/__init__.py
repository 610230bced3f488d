"""Attention as pure functions on arrays, heads last: `[B, N, H, D]`. Modules with parameters live in `models/`."""

from attn.bottleneck import bottleneck_attention
from attn.common.grid import Grid
from attn.common.merge import merge_attention
from attn.common.positions import RESAMPLE_METHODS, resample_positions, sincos_2d
from attn.common.probabilities import probabilities
from attn.core.operator import explain, fallback
from attn.dense.api import Hook, dense_attention
from attn.halo import halo_attention
from attn.neighborhood.api import neighborhood_attention
from attn.outlook.api import outlook_attention
from attn.routed.api import bilevel_routing_attention, routed_attention

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
