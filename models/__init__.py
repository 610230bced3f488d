"""Models: made by name, split into flat dictionaries of arrays, and merged again."""

# These register what they define.
import models.biformer_family
import models.biformer_variants
import models.davit_family
import models.davit_variants
import models.halonet_family
import models.halonet_variants
import models.maxvit_family
import models.maxvit_variants
import models.nat_family
import models.nat_variants
import models.operator_families
import models.swin_family
import models.swin_variants
import models.vit_family
import models.vit_variants
import models.volo_family
import models.volo_variants  # noqa: F401
from models.adapt import adapt
from models.registry import create, names, register, reset_classifier, variant
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
    "reset_classifier",
    "split",
    "stack",
    "summarize",
    "unrolled_names",
    "unstack",
    "variant",
]
