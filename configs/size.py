"""Sizes of images in pixels: one number for a square, or height and width."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from configs.schema import Config

SIZE_KEY = "config.data.image_size"
ALLOWED = "one number of pixels for a square, such as 224, or HEIGHTxWIDTH, such as 160x224"


class Size:
    """The kind of a key whose value is `side` or `(height, width)`; a pair of equal sides is one number."""

    @staticmethod
    def parse(value: Any) -> int | tuple[int, int]:
        """Reads 224, (160, 224), [160, 224], `"224"`, `"160x224"` or `"160,224"`.

        Raises:
          ValueError: it is none of these, or a side is not at least one pixel.
        """
        if isinstance(value, str):
            parts: Any = re.split(r"[x,]", value.strip().strip("()[]"))
        else:
            parts = value if isinstance(value, tuple | list) else [value]
        sides = []
        for part in parts:
            if isinstance(part, bool) or (isinstance(part, float) and part != int(part)):
                raise ValueError(f"not a number of pixels: {part!r}")
            sides.append(int(part))
        if len(sides) not in (1, 2) or min(sides) < 1:
            raise ValueError(f"takes {ALLOWED}")
        return sides[0] if len(set(sides)) == 1 else (sides[0], sides[1])


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size."""
    return (size, size) if isinstance(size, int) else size


def transforms(config: Config, key: str) -> str:
    """The transforms of `config.data`'s key with `{size}` filled in with `data.image_size`, `{size/0.875}` with the
    quotient, rounded to whole pixels, and `{size//0.875}` with the quotient rounded down, as timm does; of a rectangle
    with both, as in `(160, 224)`.
    """
    size = config.data.image_size

    def filled(match: re.Match[str]) -> str:
        divided, quotient = math.floor if match[1] == "//" else round, float(match[2] or 1)
        if isinstance(size, int):
            return str(divided(size / quotient))
        return str(tuple(divided(side / quotient) for side in size))

    return re.sub(r"\{size(?:(//?)([0-9.]+))?\}", filled, getattr(config.data, key))
