"""Draws which keys some queries see, for a few patterns: docs/neighborhood.png.

python -m benchmarks.neighborhood_picture [--output=docs/neighborhood.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from kernels.neighborhood.pattern import make_pattern
from tasks import charts

SIDE = 12
WINDOW: dict[str, Any] = {"window": 5}
# Title, arguments, query.
PATTERNS: list[tuple[str, dict[str, Any], tuple[int, int]]] = [
    ("window 5", WINDOW, (6, 5)),
    ("at a border it slides, and keeps its size", WINDOW, (0, 10)),
    ("window 4: one more before", {"window": 4}, (6, 5)),
    ("window 3, dilation 2", {"window": 3, "dilation": 2}, (6, 5)),
    ("stride 3: a run shares the window of one", {**WINDOW, "stride": 3}, (6, 5)),
    ("stride 4 = window: blocks", {"window": 4, "stride": 4}, (6, 5)),
    ("window 3, dilation 4: a grid", {"window": 3, "dilation": 4}, (6, 5)),
    ("causal along both axes", {**WINDOW, "is_causal": True}, (6, 5)),
]


def picture(options: dict[str, Any], query: tuple[int, int]) -> np.ndarray:
    """`[SIDE, SIDE, 3]`: keys, queries with the same keys, the query."""
    pattern = make_pattern((SIDE, SIDE), **options)
    mask = pattern.mask()
    number = np.ravel_multi_index(query, pattern.shape)
    colours = np.ones((pattern.tokens, 3))
    colours[mask[number]] = to_rgb("#a9cbea")
    colours[(mask == mask[number]).all(axis=1)] = to_rgb("#e7a27f")
    colours[number] = to_rgb(charts.ORANGE)
    return colours.reshape(SIDE, SIDE, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/neighborhood.png"))
    options = parser.parse_args()
    with charts.style():
        figure = Figure(figsize=(charts.WHOLE, 5.9), layout="constrained")
        for axes, (title, arguments, query) in zip(figure.subplots(2, 4).flat, PATTERNS, strict=True):
            axes.imshow(picture(arguments, query))
            axes.set_title(title, fontsize=9)
            axes.set_xticks(np.arange(SIDE + 1) - 0.5, labels=[])
            axes.set_yticks(np.arange(SIDE + 1) - 0.5, labels=[])
            axes.grid(True, color=charts.GRID, linewidth=0.6)
            axes.tick_params(length=0)
        figure.supxlabel(
            "dark: a query; coloured: the keys it sees, itself among them; light orange: those that see the same keys",
            fontsize=9,
        )
        figure.savefig(options.output, dpi=90, facecolor="white")


if __name__ == "__main__":
    main()
