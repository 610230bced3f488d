"""Softmax attention between all pairs of tokens."""

from attn.dense.api import DENSE, dense_attention, dense_maps

__all__ = ["DENSE", "dense_attention", "dense_maps"]
