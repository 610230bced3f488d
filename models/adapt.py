"""Pretrained parameters for a model with another classifier or another image size."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from attn import resample_positions

CLASSIFIERS = ("head", "head_dist")


def adapt(
    model: Any, loaded: Mapping[str, np.ndarray], fresh: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Fits `loaded` to `model` where a published practice says how, and leaves everything else as it is.

    A classifier of another size, or one that is missing, takes its `fresh` values; one that the model does not have is
    left out. Learned positions are resampled to the model's grid, prefix rows copied.

    Args:
      model: an NNX module that says its grid and prefix; it may be abstract.
      loaded: parameters by unrolled name.
      fresh: the model's own parameters by unrolled name.

    Returns:
      The adapted parameters, and one sentence for each change.

    Raises:
      ValueError: positions of a grid that is not square cannot be resampled, since the file does not say its sides.
    """
    adapted, notes = dict(loaded), []
    for head in CLASSIFIERS:
        names = [name for name in {**loaded, **fresh} if name.split(".")[0] == head]
        if all(name in loaded and name in fresh and loaded[name].shape == fresh[name].shape for name in names):
            continue
        for name in names:
            adapted.pop(name, None)
        adapted |= {name: np.asarray(fresh[name]) for name in names if name in fresh}
        before, now = (_classes(flat, head) for flat in (loaded, fresh))
        changed = f"starts anew: {before} classes there, {now} here" if now else f"with {before} classes is left out"
        notes.append(f"{head} {changed}")
    name = "pos_embed"
    if name in loaded and name in fresh and loaded[name].shape != fresh[name].shape:
        prefix = model.grid.prefix if model.prefix_positions else 0
        places = loaded[name].shape[1] - prefix
        side = math.isqrt(max(places, 0))
        if side * side != places or side == 0:
            raise ValueError(
                f"{name}: {loaded[name].shape[1]} rows are not {prefix} prefix tokens and a square grid; they cannot "
                "be resampled"
            )
        method = model.position_resample
        positions = resample_positions(loaded[name], (side, side), model.grid.shape, prefix=prefix, method=method)
        adapted[name] = np.asarray(positions)
        notes.append(f"positions resampled from {side} x {side} to {' x '.join(map(str, model.grid.shape))}")
    return adapted, notes


def _classes(flat: Mapping[str, Any], head: str) -> int:
    return flat[f"{head}.kernel"].shape[-1] if f"{head}.kernel" in flat else 0
