"""Attention mechanisms by name, for --config.model.attention (docs/mechanisms.md).

python -m models.attention '*window*'
"""

import sys

from models.attention.registry import ATTENTION
from naming import listing


def _tables() -> list[listing.Table]:
    said = {name: entry.declaration for name, entry in ATTENTION.items()}
    rows = [(name, one.summary, one.operator or "-", one.paper or "-") for name, one in said.items()]
    return [listing.Table("mechanisms", ("name", "what is mixed", "operator in attn", "paper"), rows)]


if __name__ == "__main__":
    sys.exit(listing.command("python -m models.attention", str(__doc__), _tables))
