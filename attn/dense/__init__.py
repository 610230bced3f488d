"""Softmax attention between all pairs of tokens."""

from attn.dense.api import DENSE, Hook, dense_attention

__all__ = ["DENSE", "Hook", "dense_attention"]
