"""Attention within windows of a map: the function (`api`), dense products in each window (`plain`), and kernels of
neighborhood attention for the parts that a shift cuts the map into (`parts`)."""

from attn.window.api import window_attention, window_maps

__all__ = ["window_attention", "window_maps"]
