"""Geometric maps that act alike on every field of a record: an image and what is drawn on it stay together.

Coordinates are continuous, x to the right and y down, with (0, 0) at the outer corner of the first pixel, whose
centre is (0.5, 0.5). `matrix` is the affine map from the coordinates before to those after, [[a, b, c], [d, e, f]].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from PIL import Image
from typing_extensions import override

from data.source import EncodedImage
from naming import unknown

NO_TRUTH = 255  # the class of mask pixels that come from outside the image
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}
Fill = float | tuple[float, ...]


def check_interpolation(name: str) -> None:
    """Raises ValueError, with the nearest name, for a method that there is not."""
    if name not in INTERPOLATIONS:
        raise ValueError(unknown("interpolation", name, INTERPOLATIONS))


@dataclass(frozen=True)
class Warp:
    """A geometric map with all its parameters chosen; `size` is (width, height) of what it gives."""

    size: tuple[int, int]

    @property
    def matrix(self) -> Float[np.ndarray, "2 3"]:
        """The affine map from coordinates before to coordinates after."""
        raise NotImplementedError

    def pixels(self, image: Image.Image, *, nearest: bool, fill: Fill) -> Image.Image:
        """Moves the pixels of a Pillow image; `nearest` forbids mixing neighbours, `fill` stands for the outside."""
        raise NotImplementedError

    def enlarged(self, factor: int) -> Warp:
        """The same map of an image that is `factor` times as wide and as high, to a result that is so too."""
        raise NotImplementedError

    def open(self, image: EncodedImage) -> tuple[Image.Image, Warp]:
        """Decodes an image for this warp: the pixels, and the warp to apply to them (they may come at reduced size)."""
        return image.decode(), self


@dataclass(frozen=True)
class Resample(Warp):
    """Stretches the rectangle `box` = (x_min, y_min, x_max, y_max) of the image to `size`, antialiased.

    `whole` decodes an image at its full size first, where a smaller one would do and take less time.
    """

    box: tuple[float, float, float, float]
    interpolation: str
    whole: bool = False

    @property
    @override
    def matrix(self) -> Float[np.ndarray, "2 3"]:
        x_min, y_min, x_max, y_max = self.box
        across, down = self.size[0] / (x_max - x_min), self.size[1] / (y_max - y_min)
        return np.array([[across, 0, -x_min * across], [0, down, -y_min * down]])

    @override
    def pixels(self, image: Image.Image, *, nearest: bool, fill: Fill) -> Image.Image:
        method = Image.Resampling.NEAREST if nearest else INTERPOLATIONS[self.interpolation]
        return image.resize(self.size, method, box=self.box)

    @override
    def enlarged(self, factor: int) -> Resample:
        x_min, y_min, x_max, y_max = self.box
        box = (factor * x_min, factor * y_min, factor * x_max, factor * y_max)
        return Resample((factor * self.size[0], factor * self.size[1]), box, self.interpolation, self.whole)

    @override
    def open(self, image: EncodedImage) -> tuple[Image.Image, Warp]:
        if self.whole:
            return super().open(image)
        width, height = image.size
        x_min, y_min, x_max, y_max = self.box
        least = (int(width * self.size[0] / (x_max - x_min)) + 1, int(height * self.size[1] / (y_max - y_min)) + 1)
        decoded = image.decode(least)
        if decoded.size == (width, height):
            return decoded, self
        across, down = decoded.width / width, decoded.height / height
        box = (x_min * across, y_min * down, min(x_max * across, decoded.width), min(y_max * down, decoded.height))
        return decoded, Resample(self.size, box, self.interpolation)


@dataclass(frozen=True)
class Window(Warp):
    """Cuts a window whose first pixel is `start` = (x, y) of the image; outside it are `fill` or mirrored pixels.

    `block` pixels in a row are one pixel of a smaller image of the same scene, whose mirror image this one's shall be.
    """

    start: tuple[int, int]
    mirror: bool = False
    block: int = 1

    @property
    @override
    def matrix(self) -> Float[np.ndarray, "2 3"]:
        return np.array([[1.0, 0, -self.start[0]], [0, 1.0, -self.start[1]]])

    @override
    def enlarged(self, factor: int) -> Window:
        (width, height), (left, top) = self.size, self.start
        start = (factor * left, factor * top)
        return Window((factor * width, factor * height), start, self.mirror, factor * self.block)

    @override
    def pixels(self, image: Image.Image, *, nearest: bool, fill: Fill) -> Image.Image:
        (left, top), (width, height) = self.start, self.size
        box = (left, top, left + width, top + height)
        if left >= 0 and top >= 0 and box[2] <= image.width and box[3] <= image.height:
            return image.crop(box)
        if self.mirror:
            columns = _mirrored(left, width, image.width, self.block)
            rows = _mirrored(top, height, image.height, self.block)
            return Image.fromarray(np.asarray(image)[rows[:, None], columns[None]])
        canvas = Image.new(image.mode, self.size, _colour(fill, image.mode))
        canvas.paste(image, (-left, -top))
        return canvas


@dataclass(frozen=True)
class Flip(Warp):
    """Mirrors left and right."""

    @property
    @override
    def matrix(self) -> Float[np.ndarray, "2 3"]:
        return np.array([[-1.0, 0, self.size[0]], [0, 1.0, 0]])

    @override
    def pixels(self, image: Image.Image, *, nearest: bool, fill: Fill) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


@dataclass(frozen=True)
class Affine(Warp):
    """Any affine map; `inverse` = (a, b, c, d, e, f) gives the coordinates before from those after."""

    inverse: tuple[float, float, float, float, float, float]
    interpolation: str

    @property
    @override
    def matrix(self) -> Float[np.ndarray, "2 3"]:
        backward = np.array(self.inverse).reshape(2, 3)
        linear = np.linalg.inv(backward[:, :2])
        return np.concatenate([linear, -linear @ backward[:, 2:]], axis=1)

    @override
    def pixels(self, image: Image.Image, *, nearest: bool, fill: Fill) -> Image.Image:
        method = Image.Resampling.NEAREST if nearest else INTERPOLATIONS[self.interpolation]
        colour = _colour(fill, image.mode)
        return image.transform(self.size, Image.Transform.AFFINE, self.inverse, resample=method, fillcolor=colour)


def warp_field(warp: Warp, kind: str, value: Any, fill: Fill) -> Any:
    """Applies a warp to a field of any kind; labels, arrays, tokens and text stay as they are.

    Boxes are clipped to the image and keep their rows, so that per-box labels stay aligned: one that left the image has
    no area. Points may leave it. A flow field is moved and its vectors are turned and stretched with it. Depth and
    disparity are never mixed between pixels, since what lies between two surfaces is none; disparity is stretched with
    the width. A camera K becomes A K, with `matrix` as A: what it projects lands where its pixel went. After a flip its
    focal length across is negative, so that points and poses in other fields stay as they are.
    """
    if kind in ("views", "video"):
        return [warp_field(warp, "image", image, fill) for image in value]
    if kind == "image":
        if isinstance(value, EncodedImage):
            value, warp = warp.open(value)
        if isinstance(value, Image.Image):
            return warp.pixels(value, nearest=False, fill=fill)
        return _planes(value, lambda plane: warp.pixels(plane, nearest=False, fill=_mean(fill) / 255))
    if kind == "mask":
        wide = Image.fromarray(np.asarray(value).astype(np.int32))
        return np.asarray(warp.pixels(wide, nearest=True, fill=NO_TRUTH)).astype(np.asarray(value).dtype)
    if kind == "flow":
        moved = _planes(value, lambda plane: warp.pixels(plane, nearest=False, fill=0))
        return np.einsum("...i,ji->...j", moved, warp.matrix[:, :2]).astype(np.float32)
    if kind == "heatmap":
        smooth = replace(warp, interpolation="bilinear") if isinstance(warp, Resample | Affine) else warp
        return _planes(value, lambda plane: smooth.pixels(plane, nearest=False, fill=0))
    if kind == "depth":
        return _planes(value[..., None], lambda plane: warp.pixels(plane, nearest=True, fill=0))[..., 0]
    if kind == "disparity":
        # Where two pictures are mirrored at their border, what is seen there has the opposite disparity.
        open_ended = replace(warp, mirror=False) if isinstance(warp, Window) else warp
        moved = _planes(value[..., None], lambda plane: open_ended.pixels(plane, nearest=True, fill=0))[..., 0]
        return moved * np.float32(abs(warp.matrix[0, 0]))  # mirrored pictures change their sides (`RandomFlip`)
    if kind == "camera":
        return (np.concatenate([warp.matrix, [[0, 0, 1]]]) @ value).astype(np.float32)
    if kind == "points":
        return np.concatenate([_move(warp, value[..., :2]), value[..., 2:]], axis=-1).astype(np.float32)
    if kind == "boxes":
        corners = np.stack([value[..., [0, 1]], value[..., [2, 1]], value[..., [0, 3]], value[..., [2, 3]]], axis=-2)
        moved = np.clip(_move(warp, corners), 0, warp.size)
        return np.concatenate([moved.min(axis=-2), moved.max(axis=-2)], axis=-1).astype(np.float32)
    return value


def _move(warp: Warp, points: Shaped[np.ndarray, "*n 2"]) -> Float[np.ndarray, "*n 2"]:
    return points @ warp.matrix[:, :2].T + warp.matrix[:, 2]


def _planes(array: np.ndarray, move: Callable[[Image.Image], Image.Image]) -> Float[np.ndarray, "H W C"]:
    """Applies `move` to every channel of a float array: Pillow's float images have a single one."""
    planes = [np.ascontiguousarray(array[..., channel], np.float32) for channel in range(array.shape[-1])]
    return np.stack([np.asarray(move(Image.fromarray(plane))) for plane in planes], axis=-1)


def _mirrored(start: int, length: int, size: int, block: int = 1) -> np.ndarray:
    """Indices start, start+1, ... folded back into [0, size) without repeating the block of pixels at the edge."""
    places, within = np.divmod(np.arange(start, start + length), block)
    last = size // block - 1
    period = max(2 * last, 1)
    folded = places % period
    folds = np.where(places < 0, last - 1 - places, np.maximum(places - 1, 0)) // max(last, 1)
    return np.where(folded > last, period - folded, folded) * block + np.where(folds % 2, block - 1 - within, within)


def _mean(fill: Fill) -> float:
    return sum(fill) / len(fill) if isinstance(fill, tuple) else fill


def _colour(fill: Fill, mode: str) -> Any:
    if mode == "RGB":
        channels = fill if isinstance(fill, tuple) and len(fill) == 3 else (_mean(fill),) * 3
        return tuple(round(value) for value in channels)
    return _mean(fill) if mode == "F" else round(_mean(fill))
