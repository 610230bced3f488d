"""The table of docs/preprocessing.md: what images of each variant go through.

python -m benchmarks.preprocessing
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import configs
import data
import models
from benchmarks.pages import markdown, write_between
from data.geometric import CenterCrop, Resize
from models.weights.family import FAMILIES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "preprocessing.md"


def table() -> str:
    """A row for all variants of a family that go through the same."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for family in FAMILIES.values():
        for variant in family.variants:
            rows.setdefault((family.name, *_cells(models.preprocessing(variant))), []).append(f"`{variant}`")
    names = ("pixels", "resized to", "by", "mean", "std", "as in")
    return markdown(
        [{"variants": ", ".join(found), **dict(zip(names, row[1:], strict=True))} for row, found in rows.items()]
    )


def _cells(said: models.Preprocessing) -> Iterator[str]:
    settings = configs.replace(
        configs.from_dict({}), data__image_size=said.image_size, data__eval_transforms=said.transforms
    )
    steps = data.parse_transforms(configs.transforms(settings, "eval_transforms"), said.mean, said.std).transforms
    (resize,) = (step for step in steps if isinstance(step, Resize))
    (crop,) = (step for step in steps if isinstance(step, CenterCrop))
    side = resize.size if isinstance(resize.size, int) else "x".join(map(str, resize.size))
    yield str(crop.size)
    yield f"{side} both sides" if resize.fit == "stretch" else f"{side} the shorter side"
    yield resize.interpolation
    for values in (said.mean, said.std):
        yield " ".join(f"{value:.4g}" for value in values)
    yield said.source


def main() -> int:
    """Writes the table."""
    write_between(PAGE, "table", table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
