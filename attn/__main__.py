"""Attention operators by name, functions of arrays (`attn.dense_attention`).

    python -m attn '*window*'

Mechanisms, which have parameters, are listed by `python -m models.attention`.
"""

import sys

import attn
from naming import listing


def _tables() -> list[listing.Table]:
    names = [name for name in attn.__all__ if name.endswith("_attention")]
    rows = [(name, listing.sentence(getattr(attn, name))) for name in names]
    return [listing.Table("operators", ("name", "what it computes"), rows)]


if __name__ == "__main__":
    sys.exit(listing.command("python -m attn", str(__doc__), _tables))
