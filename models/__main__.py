"""Models by name, for `models.create` and --config.model.name (docs/models.md says more of each).

python -m models 'vit*'
"""

import sys

import models
from models.core.published import PUBLISHED, Published
from models.weights.family import FAMILIES
from naming import listing

COLUMNS = ("name", "family", "pixels", "parameters, M", "top-1, %")


def _tables() -> list[listing.Table]:
    families = {name: family.name for family in FAMILIES.values() for name in family.variants}
    rows = []
    for name in models.names():
        pixels = models.options_of_model(name).get("image_size")
        printed = PUBLISHED.get(name, Published())
        values = (families.get(name), pixels, printed.parameters, printed.top1)
        rows.append((name, *("-" if value is None else str(value) for value in values)))
    return [listing.Table("models", COLUMNS, rows)]


if __name__ == "__main__":
    sys.exit(listing.command("python -m models", str(__doc__), _tables))
