"""How the pixels of a run's images were scaled and how large they are, by its configuration.

A model that gets the images of another run, as a frozen teacher does, needs them in its own terms; one that starts from
the weights of another run at least says that they differ.
"""

from __future__ import annotations

import numpy as np

import configs
import data
from configs import Config

Scale = tuple[np.ndarray, np.ndarray]
"""(mean, std), each [channels] or [1]: pixels from 0 to 1 come as `(pixel - mean) / std`."""


def scale(config: Config, transforms: str) -> Scale | None:
    """How the images of a run leave its `train_transforms` or `eval_transforms` (the argument names the key); None
    unless exactly one `normalize` or `value_range` says it.
    """
    text = configs.transforms(config, transforms)
    found = [
        one
        for transform in data.parse_transforms(text, config.data.mean, config.data.std).transforms
        if (one := transform.pixel_scale("image")) is not None
    ]
    return found[0] if len(found) == 1 else None


def sides(config: Config) -> tuple[int, int]:
    """(height, width) of a run's images, in pixels."""
    return configs.pair(config.data.image_size)


def rescaled(ours: Scale, theirs: Scale) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """`(factor, shift)` for each channel by which `image * factor + shift` has their scale; None for the same one."""
    (mean, std), (other_mean, other_std) = ours, theirs
    factor, shift = np.broadcast_arrays(std / other_std, (mean - other_mean) / other_std)
    if np.allclose(factor, 1, rtol=0, atol=1e-6) and np.allclose(shift, 0, rtol=0, atol=1e-6):
        return None
    return tuple(factor.tolist()), tuple(shift.tolist())


def spelled(one: Scale) -> str:
    """`mean 0.5, 0.5, 0.5 and std 0.2`."""
    mean, std = (", ".join(f"{value:.4g}" for value in part) for part in one)
    return f"mean {mean} and std {std}"
