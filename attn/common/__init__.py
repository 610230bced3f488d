"""Pieces of several operators: windows, positions, biases, maps."""
