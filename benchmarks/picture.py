"""The picture in README: learning curves and confusion of an evaluated run, side by side.

python -m benchmarks.picture --workdir=runs/quickstart --output=docs/quickstart.png
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from tasks import charts
from training.evaluation import report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="a run that eval.py has evaluated")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    curves = report.training_curves(report.read_history(options.workdir / "metrics.jsonl"), "top1", "images")[:2]
    results = json.loads((options.workdir / "eval" / "test.json").read_text())["results"]
    matrix = np.asarray(results["confusion"])
    confusion = charts.confusion_charts(matrix, [str(number) for number in range(len(matrix))])[0]
    tiles = []
    for chart in [*curves, confusion]:
        buffer = io.BytesIO()
        with charts.style():
            chart.figure.savefig(buffer, format="png", dpi=110, facecolor="white")
        tiles.append(Image.open(buffer).convert("RGB"))
    height = min(tile.height for tile in tiles)
    tiles = [
        tile.resize((round(tile.width * height / tile.height), height), Image.Resampling.LANCZOS) for tile in tiles
    ]
    whole = Image.new("RGB", (sum(tile.width for tile in tiles), height), "white")
    left = 0
    for tile in tiles:
        whole.paste(tile, (left, 0))
        left += tile.width
    whole.quantize(64).save(options.output, optimize=True)


if __name__ == "__main__":
    main()
