"""Which parameters decay, and the learning rate of each layer: numbers per leaf, decided by unrolled name and shape."""

import math
import re
from collections.abc import Callable, Mapping

import numpy as np

from training.optim.patterns import Shaped, nearest, per_layer, unrolled, unrolled_shape

# Leaves that are inputs or gains rather than matrices, whatever their rank: searched in the last two segments of a
# name, so that `pos_embed.embedding` and `attn.rel_pos_table` are found and `token_mixing.kernel` is a kernel.
_NOT_A_MATRIX = re.compile(r"bias|scale|gamma|temperature|pos|token|cls|regist|probe|latent")


def _is_kernel(name: str, shape: tuple[int, ...]) -> bool:
    return name.rsplit(".", 1)[-1] == "kernel"


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return _is_kernel(name, shape) or (len(shape) >= 2 and _NOT_A_MATRIX.search(".".join(name.split(".")[-2:])) is None)


def _is_anything(name: str, shape: tuple[int, ...]) -> bool:
    return True


DECAYED: dict[str, Callable[[str, tuple[int, ...]], bool]] = {
    "kernels": _is_kernel,
    "matrices": _is_matrix,
    "all": _is_anything,
}


def decayed(which: str, params: Mapping[str, Shaped]) -> dict[str, bool]:
    """Leaves with weight decay (all layers of a stacked leaf have one shape and one last name, hence one answer).

    Args:
        which: "kernels", the leaves named `kernel` (big_vision); "matrices", these and every other leaf of unrolled
            rank 2 or more unless its last two name segments contain one of bias, scale, gamma, temperature, pos, token,
            cls, regist, probe, latent (timm, plus the register tokens); "all".
    """
    if which not in DECAYED:
        raise ValueError(nearest("config.optim.weight_decay_on", which, DECAYED))
    return {name: DECAYED[which](name, unrolled_shape(name, leaf)) for name, leaf in params.items()}


_BLOCK = re.compile(r"blocks\.(\d+)(?:\.|$)")
_STEM = re.compile(r"(?:patch_embed|stem|embed|[^.]*(?:pos|token|cls|regist)[^.]*)(?:\.|$)")


def block_layers(params: Mapping[str, Shaped]) -> tuple[Callable[[str], int], int]:
    """Layer numbers of a model with one stack `blocks.i` (BEiT, arXiv:2106.08254, appendix).

    Returns:
        `(layer_of, num_layers)`: 0 for patch embedding, positions and prefix tokens, `i + 1` for `blocks.i`, and
        `num_layers = depth + 1` for everything else (final norm, pooling, head).
    """
    blocks = [_BLOCK.match(one) for name, leaf in params.items() for one in unrolled(name, leaf)]
    depth = max((int(found[1]) + 1 for found in blocks if found), default=0)
    if depth == 0:
        raise ValueError("config.optim.layer_decay: the model has no `blocks.i` that order its layers; set it to 1.0")

    def layer_of(name: str) -> int:
        found = _BLOCK.match(name)
        if found:
            return int(found[1]) + 1
        return 0 if _STEM.match(name) else depth + 1

    return layer_of, depth + 1


def layer_scales(
    params: Mapping[str, Shaped], layer_decay: float, layer_of: Callable[[str], int] | None, num_layers: int | None
) -> dict[str, np.ndarray]:
    """Learning-rate factor of each parameter, `layer_decay ** (num_layers - layer_of(name))`: {name: [] or [L]}.

    Args:
        layer_decay: 1.0 is off; typically 0.65 to 0.85 in fine-tuning.
        layer_of: number of an unrolled name, from 0 (next to the pixels) to `num_layers` (the head, factor 1); None
            for `block_layers`.
        num_layers: the largest number; given if and only if `layer_of` is.
    """
    if not (math.isfinite(layer_decay) and layer_decay > 0):
        raise ValueError(f"config.optim.layer_decay: {layer_decay} is not a positive number (1.0 is off)")
    if layer_decay == 1.0:
        return {name: per_layer(name, leaf, lambda one: np.float32(1)) for name, leaf in params.items()}
    if layer_of is None or num_layers is None:
        layer_of, num_layers = block_layers(params)
    top, number = num_layers, layer_of

    def scale(name: str) -> np.float32:
        if not 0 <= number(name) <= top:
            raise AssertionError(f"layer number {number(name)} of {name} is not between 0 and {top}")
        return np.float32(layer_decay ** (top - number(name)))

    return {name: per_layer(name, leaf, scale) for name, leaf in params.items()}
