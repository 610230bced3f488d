"""Neighborhood attention: its pattern in integers, an oracle, and kernels that agree with it."""
