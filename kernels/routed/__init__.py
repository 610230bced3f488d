"""Attention of the regions of a map to the regions they are routed to: fused kernels and their oracle."""
