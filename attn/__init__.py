"""Attention as pure functions on arrays, heads last: `[B, N, H, D]`. Modules with parameters live in `models/`."""

from attn.bottleneck import bottleneck_attention, bottleneck_maps
from attn.channel import channel_attention, channel_maps
from attn.common.grid import Grid
from attn.common.merge import merge_attention
from attn.common.positions import RESAMPLE_METHODS, resample_positions, sincos_2d
from attn.core.explain import explain, fallback
from attn.core.masks import Mask, causal, lengths, sliding_window
from attn.core.numerics import Edit
from attn.dense import dense_attention, dense_maps, packed_attention
from attn.halo import halo_attention, halo_maps
from attn.neighborhood import neighborhood_attention, neighborhood_maps, token_neighborhood_attention
from attn.outlook import outlook_attention, outlook_maps
from attn.routed import bilevel_routing_attention, routed_attention, routed_maps
from attn.window import window_attention, window_maps

__all__ = [
    "RESAMPLE_METHODS",
    "Edit",
    "Grid",
    "Mask",
    "bilevel_routing_attention",
    "bottleneck_attention",
    "bottleneck_maps",
    "causal",
    "channel_attention",
    "channel_maps",
    "dense_attention",
    "dense_maps",
    "explain",
    "fallback",
    "halo_attention",
    "halo_maps",
    "lengths",
    "merge_attention",
    "neighborhood_attention",
    "neighborhood_maps",
    "outlook_attention",
    "outlook_maps",
    "packed_attention",
    "resample_positions",
    "routed_attention",
    "routed_maps",
    "sincos_2d",
    "sliding_window",
    "token_neighborhood_attention",
    "window_attention",
    "window_maps",
]
