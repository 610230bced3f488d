"""Models: made by name, split into flat dictionaries of arrays, and merged again."""

import models.families  # noqa: F401  (its folders declare what there is)
from models.attention.registry import register_mechanism
from models.core.attention_map import AttentionMap, attention_map, attention_rollout
from models.core.call import Call, Memory
from models.core.registry import create, names, options_of_model, register, reset_classifier, variant
from models.core.rollout import rollout
from models.core.state import Graph, merge, split, stack, unrolled_names, unstack
from models.core.summary import summarize
from models.core.tap import SITES, Site, Tap, tap
from models.core.taps import ablate_heads, add, append_keys, drop_keys, record, replace, scale_logits, steer
from models.core.watch import Recorded
from models.layers.norm import freeze_statistics
from models.weights.adapt import adapt
from models.weights.family import register_family
from models.weights.load import compare_weights, convert_weights, export_weights, load_weights
from models.weights.preprocessing import Preprocessing
from models.weights.stated import preprocessing

__all__ = [
    "SITES",
    "AttentionMap",
    "Call",
    "Graph",
    "Memory",
    "Preprocessing",
    "Recorded",
    "Site",
    "Tap",
    "ablate_heads",
    "adapt",
    "add",
    "append_keys",
    "attention_map",
    "attention_rollout",
    "compare_weights",
    "convert_weights",
    "create",
    "drop_keys",
    "export_weights",
    "freeze_statistics",
    "load_weights",
    "merge",
    "names",
    "options_of_model",
    "preprocessing",
    "record",
    "register",
    "register_family",
    "register_mechanism",
    "replace",
    "reset_classifier",
    "rollout",
    "scale_logits",
    "split",
    "stack",
    "steer",
    "summarize",
    "tap",
    "unrolled_names",
    "unstack",
    "variant",
]
