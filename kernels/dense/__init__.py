"""Kernels of dense attention of short sequences, and their oracle."""
