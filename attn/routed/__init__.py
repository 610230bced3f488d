"""Bi-level routing attention: regions choose regions, and tokens attend to those of the chosen ones."""

from attn.routed.api import (
    ROUTED,
    affinity,
    bilevel_routing_attention,
    region_means,
    route,
    routed_attention,
    top_regions,
    usable_regions,
)

__all__ = [
    "ROUTED",
    "affinity",
    "bilevel_routing_attention",
    "region_means",
    "route",
    "routed_attention",
    "top_regions",
    "usable_regions",
]
