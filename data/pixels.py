"""What the pixels of a file mean: how any depth becomes 8 bits, and what becomes of alpha and of EXIF's rotation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image

from naming import unknown

ALPHA = ("drop", "black", "white", "refuse")
ORIENTATION = 0x0112
"""The EXIF tag that says how a camera was held (CIPA DC-008, "Orientation")."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIXTEEN_BITS = (0.0, 65535.0)
LEAST_OF_SIXTEEN_BITS = 2**14
"""An image whose largest value is below may hold 10, 12 or 14 bits in 16, as many cameras and scanners write."""
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF 6.0


@dataclass(frozen=True)
class Reading:
    """How image files are read; the keys of the same names in the configuration group `data`.

    Args:
        pixel_range: (black, white), the values of more than 8 bits that become 0 and 255; those outside are clipped.
            Empty takes 0 to 65535 of 16 bits and 0 to 1 of floating point, and refuses what may be something else. A
            file that says itself what its white is (PGM, TIFF of 9 to 15 bits) is read so in any case.
        alpha: "drop" takes the colours as they are stored, "black" and "white" put them on that ground, "refuse"
            raises where there is transparency.
        exif_rotation: turn an image as its EXIF block says. TIFF files are turned in any case.
    """

    pixel_range: tuple[float, ...] = ()
    alpha: str = "drop"
    exif_rotation: bool = False

    @classmethod
    def of(cls, settings: Any) -> Reading:
        """As a configuration group with these keys says."""
        return cls(settings.pixel_range, settings.alpha, settings.exif_rotation)

    def __post_init__(self) -> None:
        try:
            limits = tuple(float(value) for value in self.pixel_range)
        except (TypeError, ValueError):
            limits = (math.nan,)
        if limits and not (len(limits) == 2 and all(map(math.isfinite, limits)) and limits[0] < limits[1]):
            raise ValueError(f"data.pixel_range must be black,white such as 0,4095, got {self.pixel_range!r}")
        object.__setattr__(self, "pixel_range", limits)
        if self.alpha not in ALPHA:
            raise ValueError(unknown("data.alpha", self.alpha, ALPHA))


def eight_bit(opened: Image.Image, mode: str, reading: Reading) -> Image.Image:
    """An opened file of any depth in Pillow's mode "RGB" or "L"; not turned.

    Raises:
        ValueError: it is not known what its values mean, or it has transparency where there should be none; the
            message says what to set.
    """
    declared, deep_colours, inverted = _declared_range(opened), _has_deep_colours(opened), _white_is_zero(opened)
    opened.load()
    if reading.alpha != "drop" and opened.has_transparency_data:
        opened = _on_ground(opened, reading.alpha)
    if opened.mode == "F" or opened.mode.startswith("I"):
        values = np.asarray(opened)
        black, white = declared or reading.pixel_range or usual_range(values, f"mode {opened.mode}")
        grey = scale(values, black, white)
        opened = Image.fromarray(255 - grey if inverted else grey)
    elif deep_colours:
        _check_deep_colours(opened, reading)
    return opened.convert(mode)


def scale(values: Shaped[np.ndarray, "*shape"], black: float, white: float) -> UInt8[np.ndarray, "*shape"]:
    """Values of any type in 8 bits, rounded; those outside of black and white are clipped."""
    return np.rint(np.clip((values.astype(np.float64) - black) * (255 / (white - black)), 0, 255)).astype(np.uint8)


def usual_range(values: Shaped[np.ndarray, "*shape"], what: str) -> tuple[float, float]:
    """(black, white) of values of more than 8 bits if there is no doubt about them.

    Raises:
        ValueError: there is, because they are no floats from 0 to 1, and no integers that need 15 or 16 bits.
    """
    low, high = values.min(), values.max()
    if low == high == 0:
        return SIXTEEN_BITS
    if values.dtype.kind == "f":
        known = (0.0, 1.0) if low >= 0 and high <= 1 else None
    else:
        known = SIXTEEN_BITS if low >= 0 and LEAST_OF_SIXTEEN_BITS <= high <= SIXTEEN_BITS[1] else None
    if known is None:
        white = next((white for white in (255, 1023, 4095, 16383, 65535) if low >= 0 and high <= white), None)
        example = f", such as 0,{white}" if white else ""
        raise ValueError(
            f"{what} with values from {low:g} to {high:g}: which of them are black and white is not known; set "
            f"data.pixel_range=black,white{example}"
        )
    return known


def orientation(opened: Image.Image) -> int:
    """How an opened file has to be turned, 1 to 8 as in EXIF; Pillow turns TIFF files itself."""
    return 1 if opened.format == "TIFF" else int(opened.getexif().get(ORIENTATION, 1))


def _tag(opened: Image.Image, number: int) -> Any:
    return getattr(opened, "tag_v2", {}).get(number)


def _white_is_zero(opened: Image.Image) -> bool:
    return _tag(opened, _PHOTOMETRIC) == _WHITE_IS_ZERO


def _declared_range(opened: Image.Image) -> tuple[float, float] | None:
    """What the file itself says about its white: PGM does, and Pillow makes 65535 of it; so does TIFF of 9 to 15 bits.

    TIFF's MaxSampleValue is a statistic of one image, and is not for display, by its specification.
    """
    if opened.format == "PPM" and opened.mode == "I":
        return SIXTEEN_BITS
    bits = _tag(opened, _BITS_PER_SAMPLE)
    return (0.0, 2.0 ** bits[0] - 1) if opened.mode.startswith("I") and bits and bits[0] < 16 else None


def _has_deep_colours(opened: Image.Image) -> bool:
    """Whether Pillow is about to take the upper 8 of 16 bits: its way with more than one channel."""
    return any(";16" in str(part[3]) for part in getattr(opened, "tile", ())) and not opened.mode.startswith("I")


def _check_deep_colours(opened: Image.Image, reading: Reading) -> None:
    if reading.pixel_range not in ((), SIXTEEN_BITS):
        low, high = reading.pixel_range
        raise ValueError(
            f"it has 16 bits a channel, which are read as 0 to 65535; data.pixel_range={low:g},{high:g} is for grey"
        )
    high = int(np.asarray(opened.convert("RGB")).max())
    if not reading.pixel_range and high < LEAST_OF_SIXTEEN_BITS >> 8:
        raise ValueError(
            f"it has 16 bits a channel and no value above {256 * high + 255}: which one is white is not known; save it "
            "with 8 bits, or set data.pixel_range=0,65535 if it is as dark as that"
        )


def _on_ground(opened: Image.Image, ground: str) -> Image.Image:
    if ground == "refuse":
        raise ValueError("it has transparency (data.alpha=refuse)")
    if opened.mode.startswith("I"):
        raise ValueError(f"transparency in mode {opened.mode} is not supported; set data.alpha=drop")
    below = Image.new("RGBA", opened.size, ground)
    below.alpha_composite(opened.convert("RGBA"))
    return below
