"""Names that other projects give to the weights of a ViT, rewritten to those of the family's tables.

Each function takes `(arrays, model)` and returns the renamed arrays and sentences for the user.
"""

import re
from collections.abc import Collection
from typing import Any

import numpy as np

from models.weights.family import Dialect
from models.weights.table import Flat

Rewritten = tuple[Flat, list[str]]


def _any(names: Collection[str], pattern: str) -> bool:
    compiled = re.compile(pattern)
    return any(compiled.fullmatch(name) for name in names)


def _renamed(arrays: Flat, *rules: tuple[str, str]) -> Flat:
    """Names after each (pattern, replacement) in turn."""
    names = {name: name for name in arrays}
    for pattern, replacement in rules:
        names = {name: re.sub(pattern, replacement, renamed) for name, renamed in names.items()}
    return {names[name]: array for name, array in arrays.items()}


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def _deit3(arrays: Flat, model: Any) -> Rewritten:
    return _renamed(arrays, (r"^(blocks\.\d+)\.gamma_(\d)$", r"\1.ls\2.gamma")), []


def _dinov2(arrays: Flat, model: Any) -> Rewritten:
    """Chunks of blocks are counted twice, `blocks.<chunk>.<block>`, the block from the first of the model."""
    kept = {name: array for name, array in arrays.items() if name != "mask_token"}
    renamed = _renamed(
        kept,
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
        (r"\.mlp\.w12\.", ".mlp.fc1."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
        (r"^register_tokens$", "reg_token"),
    )
    return renamed, ["mask_token is left out"] if len(kept) < len(arrays) else []


def _split_swiglu(arrays: Flat, model: Any) -> Rewritten:
    """timm's SwiGLU has gate and value as two layers; here they are one."""
    joined = dict(arrays)
    for gate in arrays:
        value = gate.replace(".mlp.fc1_g.", ".mlp.fc1_x.")
        # What does not go together stays, and is reported as left over.
        if value != gate and value in arrays and arrays[gate].ndim > 0 and arrays[gate].shape == arrays[value].shape:
            joined[gate.replace("fc1_g", "fc1")] = np.concatenate([joined.pop(gate), joined.pop(value)])
    return joined, []


# --- JAX --------------------------------------------------------------------------------------------------------------

_PREFIXES = ("opt/target/", "params/img/", "params/", "")
_EMBEDDING = "embedding/kernel"


def _big_vision(arrays: Flat, model: Any) -> Rewritten:
    """Prefix off, layers of a scanned model apart, old names to new ones."""
    notes = []
    prefix = next(prefix for prefix in _PREFIXES if prefix + _EMBEDDING in arrays)
    named = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    if len(named) < len(arrays):
        notes.append(f"{len(arrays) - len(named)} entries outside {prefix} are left out")
    scanned = "Transformer/encoderblock/"
    for name in [name for name in named if name.startswith(scanned)]:
        layers = np.atleast_1d(named.pop(name))
        rest = name.removeprefix(scanned)
        named |= {f"Transformer/encoderblock_{layer}/{rest}": array for layer, array in enumerate(layers)}
    named = _renamed(
        named,
        (r"^Transformer/posembed_input/pos_embedding$", "pos_embedding"),
        (r"/LayerNorm_2/", "/LayerNorm_1/"),
        (r"(encoderblock_\d+)/MultiHeadDotProductAttention_1/", r"\1/MultiHeadDotProductAttention_0/"),
        (r"(encoderblock_\d+)/MlpBlock_3/", r"\1/MlpBlock_0/"),
    )
    if model.options.activation == "gelu":
        notes.append(
            "GELU there is the tanh approximation, here it is exact; activation='gelu_tanh' gives the same function"
        )
    return named, notes


def _is_big_vision(names: Collection[str]) -> bool:
    return any(prefix + _EMBEDDING in names for prefix in _PREFIXES)


VIT_DIALECTS = (
    Dialect("DeiT-III", lambda names: _any(names, r"blocks\.\d+\.gamma_\d"), _deit3),
    Dialect(
        "DINOv2",
        lambda names: _any(names, r"mask_token|register_tokens|blocks\.\d+\.(mlp\.w12|\d+\.norm1)\..*"),
        _dinov2,
    ),
    Dialect("timm's SwiGLU", lambda names: _any(names, r"blocks\.\d+\..*mlp\.fc1_g\.weight"), _split_swiglu),
    Dialect("big_vision", _is_big_vision, _big_vision, layout="big_vision"),
)
