"""Bi-level routing attention: regions choose regions, and tokens attend to those of the chosen ones."""

from attn.routed.api import ROUTED, bilevel_routing_attention, routed_attention, routed_maps
from attn.routed.routing import affinity, region_means, route, top_regions, usable_regions

__all__ = [
    "ROUTED",
    "affinity",
    "bilevel_routing_attention",
    "region_means",
    "route",
    "routed_attention",
    "routed_maps",
    "top_regions",
    "usable_regions",
]
