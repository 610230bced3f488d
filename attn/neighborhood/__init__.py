"""Neighborhood attention: every query sees the keys around it."""

from attn.neighborhood.api import NEIGHBORHOOD, neighborhood_attention, token_neighborhood_attention
from attn.neighborhood.maps import neighborhood_maps

__all__ = ["NEIGHBORHOOD", "neighborhood_attention", "neighborhood_maps", "token_neighborhood_attention"]
