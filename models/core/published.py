"""What papers and official repositories report of a variant, as data: tables and tests read it, nothing is retyped."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Published:
    """Reported figures of one variant; text as it is printed, since its last digit says how exact it is.

    Attributes:
      multiply_adds: of one image at `image_size`, in G; None where none is reported.
      top1: accuracy on ImageNet-1k's validation set in percent, of one crop at `image_size`.
      parameters: in M.
      image_size: side in pixels that the figures are for.
      source: arXiv number or project.
      note: what the figures depend on ("from ImageNet-22k").
      besides: multiply-adds, in G, that are in the reported figure and that this project does not count; `note` or the
        family's page says of what.
    """

    multiply_adds: str | None = None
    top1: str | None = None
    parameters: str | None = None
    image_size: int = 224
    source: str = ""
    note: str = ""
    besides: float = 0.0


PUBLISHED: dict[str, Published] = {}
"""Figures by variant name."""


def publish(table: Mapping[str, Published]) -> None:
    """Adds the figures of a family. ValueError for a name that has some."""
    if taken := PUBLISHED.keys() & table.keys():
        raise ValueError(f"published figures are already known for {', '.join(sorted(taken))}")
    PUBLISHED.update(table)


def tolerance(figure: str) -> float:
    """Half a unit of the last printed digit, or 2%, whichever is larger.

    >>> tolerance("4.5")
    0.09
    """
    half = 0.5 * 10.0 ** -len(figure.partition(".")[2])
    return max(half, 0.02 * float(figure))
