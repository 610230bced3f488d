"""Models: made by name, split into flat dictionaries of arrays, and merged again."""

import models.vit_variants  # noqa: F401  (registers its names)
from models.adapt import adapt
from models.registry import create, names, register, variant
from models.state import Graph, merge, split, stack, unrolled_names, unstack
from models.summary import summarize

__all__ = [
    "Graph",
    "adapt",
    "create",
    "merge",
    "names",
    "register",
    "split",
    "stack",
    "summarize",
    "unrolled_names",
    "unstack",
    "variant",
]
