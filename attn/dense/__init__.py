"""Softmax attention between all pairs of tokens."""

from attn.dense.api import DENSE, dense_attention, dense_maps
from attn.dense.packed import PACKED, packed_attention

__all__ = ["DENSE", "PACKED", "dense_attention", "dense_maps", "packed_attention"]
