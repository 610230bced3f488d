"""Models: made by name, split into flat dictionaries of arrays, and merged again."""

import models.families  # noqa: F401  (its folders declare what there is)
from models.core.registry import create, names, register, reset_classifier, variant
from models.core.state import Graph, merge, split, stack, unrolled_names, unstack
from models.core.summary import summarize
from models.weights.adapt import adapt
from models.weights.family import register_family
from models.weights.load import convert_weights, export_weights, load_weights

__all__ = [
    "Graph",
    "adapt",
    "convert_weights",
    "create",
    "export_weights",
    "load_weights",
    "merge",
    "names",
    "register",
    "register_family",
    "reset_classifier",
    "split",
    "stack",
    "summarize",
    "unrolled_names",
    "unstack",
    "variant",
]
