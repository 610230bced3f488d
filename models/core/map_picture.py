"""Pictures of attention maps over images."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

if TYPE_CHECKING:
    from models.core.attention_map import AttentionMap

COLUMNS = 6
SIDE = 1.9  # inches of a panel


class Picture(Figure):
    """A figure that a notebook shows by itself, whether or not it has a backend of matplotlib."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def plot(one: AttentionMap, images: Any = None, *, alpha: float = 0.6) -> Picture:
    """A row for each image, with the image itself and a panel for each head; wrapped where there are many heads.

    Each panel has a scale of its own, from 0 to its largest share, which stands above it. The place that looks is
    framed.

    Args:
      images: what the maps are of, `[B, Y, X, I]`, or `[Y, X, I]` for a map of one; of 1 or 3 channels. Numbers outside
        of 0 to 1 (normalized images, integers) are stretched to it. None: the maps alone.
      alpha: how much of the map covers the image, from 0 to 1.

    Raises:
      ValueError: images of another kind or number than the maps.
    """
    values = np.asarray(one.values, np.float32)
    values = values if values.ndim == 4 else values[None]
    shown = None if images is None else _pixels(images, len(values))
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha!r}: how much of the map covers the image; allowed: 0 to 1")
    rows_each, panels = -(-values.shape[1] // COLUMNS), min(values.shape[1], COLUMNS)
    first = 0 if shown is None else 1
    rows, columns = len(values) * rows_each, panels + first
    figure = Picture(figsize=(SIDE * columns, (SIDE + 0.25) * rows + 0.3), layout="constrained")
    figure.suptitle(_title(one), fontsize=9)
    axes = figure.subplots(rows, columns, squeeze=False)
    for each in axes.flat:
        each.axis("off")
    for number in range(len(values)):
        picture = None if shown is None else shown[number]
        if picture is not None:
            axes[number * rows_each, 0].imshow(picture, cmap="gray", vmin=0, vmax=1)
        for place in range(len(one.heads)):
            row, column = divmod(place, COLUMNS)
            draw(axes[number * rows_each + row, first + column], one, place, picture, alpha, number)
    return figure


def draw(axes: Axes, one: AttentionMap, place: int, picture: Any = None, alpha: float = 0.6, number: int = 0) -> None:
    """One panel: the map of a head over an image, with a frame around the place that looks.

    Args:
      place: of the head in `one.heads`.
      picture: from 0 to 1, `[Y, X]` or `[Y, X, 3]`.
      number: of the image, of a map of several.
    """
    values = np.asarray(one.values, np.float32)
    values = (values[number] if values.ndim == 4 else values)[place]
    height, width = values.shape if picture is None else picture.shape[:2]
    if picture is not None:
        # Without colours of its own, those of the map are not mixed with others.
        axes.imshow(picture.mean(-1) if picture.ndim == 3 else picture, cmap="gray", vmin=0, vmax=1)
    largest = max(float(values.max()), 1e-12)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.imshow(values, cmap="inferno", vmin=0, vmax=largest, extent=extent, alpha=1 if picture is None else alpha)
    name = one.heads[place]
    axes.set_title(f"{'mean' if name == 'mean' else f'head {name}'}, to {largest:.2g}", fontsize=7, pad=2)
    axes.axis("off")
    if isinstance(one.query, tuple):
        row, column = one.query
        down, across = height / one.queries.shape[0], width / one.queries.shape[1]
        corner = (column * across - 0.5, row * down - 0.5)
        axes.add_patch(Rectangle(corner, across, down, fill=False, edgecolor="cyan", linewidth=1.2))


def _title(one: AttentionMap) -> str:
    who = {"cls": "the class token", "mean": "all places alike"}.get(str(one.query), f"place {one.query}")
    return f"{one.layer}: what is looked at by {who}"


def _pixels(images: Any, count: int) -> Float[np.ndarray, "B Y X ..."]:
    """Images from 0 to 1; of one channel without the axis of channels."""
    images = np.asarray(images)
    images = images[None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or len(images) != count:
        raise ValueError(
            f"images of {images.shape} for {count} map{'s' if count > 1 else ''}; allowed: as many images, "
            "(batch, rows, columns, channels) with 1 or 3 channels"
        )
    images = images.astype(np.float32)
    low, high = images.min((1, 2, 3), keepdims=True), images.max((1, 2, 3), keepdims=True)
    stretched = (images - low) / np.maximum(high - low, 1e-9)
    inside = (low >= 0) & (high <= 1)
    images = np.where(inside, images, stretched)
    return images[..., 0] if images.shape[-1] == 1 else images
