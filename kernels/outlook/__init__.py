"""Kernels of outlook attention (VOLO, arXiv:2106.13112)."""
