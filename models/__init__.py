"""Models: made by name, split into flat dictionaries of arrays, and merged again."""

# These register what they define.
import models.nat_family
import models.nat_variants
import models.operator_families
import models.vit_family
import models.vit_variants  # noqa: F401
from models.adapt import adapt
from models.registry import create, names, register, variant
from models.state import Graph, merge, split, stack, unrolled_names, unstack
from models.summary import summarize
from models.weights import convert_weights, export_weights, load_weights

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
    "split",
    "stack",
    "summarize",
    "unrolled_names",
    "unstack",
    "variant",
]
