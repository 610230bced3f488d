"""Data sets and transforms by name, for --config.data.name and --config.data.train_transforms (docs/data.md).

python -m data
python -m data '*crop*'
"""

import inspect
import sys

import data
from naming import listing


def _tables() -> list[listing.Table]:
    sources = [(name, listing.sentence(opener)) for name, opener in sorted(data.sources().items())]
    transforms = [(name, _arguments(kind), listing.sentence(kind)) for name, kind in data.TRANSFORMS.items()]
    return [
        listing.Table("sources", ("name", "what it is"), sources),
        listing.Table("transforms", ("name", "takes", "what it does"), transforms),
    ]


def _arguments(transform: type) -> str:
    """Its parameters with their defaults, as they are written in a configuration; `on` and `fill` have all or many."""
    shown = [one for one in inspect.signature(transform).parameters.values() if one.name not in ("on", "fill")]
    return ", ".join(one.name if one.default is one.empty else f"{one.name}={_short(one.default)}" for one in shown)


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_short, value))})"
    return f"{value:.3g}" if isinstance(value, float) else repr(value)


if __name__ == "__main__":
    sys.exit(listing.command("python -m data", str(__doc__), _tables))
