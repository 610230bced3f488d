"""Experiments by name, for --config=NAME.

python -m configs 'swin*'
"""

import sys

from configs import shipped
from naming import listing


def _tables() -> list[listing.Table]:
    rows = [(name, listing.sentence(shipped.description(name))) for name in shipped.names()]
    return [listing.Table("configurations", ("name", "what it trains"), rows)]


if __name__ == "__main__":
    sys.exit(listing.command("python -m configs", str(__doc__), _tables))
