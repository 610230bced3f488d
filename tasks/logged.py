"""Pictures in the logs that have a place for them, TensorBoard and Weights & Biases."""

from __future__ import annotations

from typing import Any

import numpy as np

from tasks.base import Picture

MOST_PIXELS = 512
"""Along the longer side."""


def on_tensorboard(writer: Any, name: str, picture: Picture, step: int) -> None:
    """Adds a picture to event files.

    Args:
      writer: a `tensorboardX.SummaryWriter`.
    """
    pixels = _small(picture)
    writer.add_image(name, pixels, step, dataformats="HW" if pixels.ndim == 2 else "HWC")


def on_wandb(wandb: Any, picture: Picture, caption: str) -> Any:
    """The picture as the package `wandb` logs it."""
    return wandb.Image(_small(picture), caption=caption)


def _small(picture: Picture) -> np.ndarray:
    """The pixels, of a large picture every second or every few: a log is written at each evaluation."""
    pixels = picture.rounded()
    every = -(-max(pixels.shape[:2]) // MOST_PIXELS)
    return pixels[::every, ::every]
