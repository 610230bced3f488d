"""Meshes, processes, and how they start, watch each other and stop."""
