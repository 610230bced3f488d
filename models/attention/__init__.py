"""Attention mechanisms as modules, one a file."""
