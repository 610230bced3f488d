"""Neighborhood attention: every query sees the keys around it."""

from attn.neighborhood.api import NEIGHBORHOOD, neighborhood_attention

__all__ = ["NEIGHBORHOOD", "neighborhood_attention"]
