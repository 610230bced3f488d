"""What somebody may have meant who misspelt a name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_LISTED = 20


def close(name: str, names: Iterable[str], most: int = 3, cutoff: float = 0.5) -> list[str]:
    """Known names that resemble `name`, best first: those whose words begin with its letters (`lr` for
    `learning_rate`), or else those with much the same letters.

    Args:
      most: at most so many.
      cutoff: least likeness, from 0 (any) to 1 (equal).
    """
    known = [str(n) for n in names]
    initials = [n for n in known if "_" in n and "".join(word[:1] for word in n.split("_")) == name]
    return (initials or difflib.get_close_matches(str(name), known, n=most, cutoff=cutoff))[:most]


def hint(name: str, names: Iterable[str], most: int = 3, cutoff: float = 0.5) -> str:
    """` (nearest: x, y)` for the end of a message, or nothing where no name resembles `name`."""
    found = close(name, names, most, cutoff)
    return f" (nearest: {', '.join(found)})" if found else ""


def unknown(what: str, name: str, allowed: Iterable[str]) -> str:
    """`unknown transform 'flop'; nearest: 'flip'; allowed: ...`, the list cut after 20 names."""
    names = sorted(allowed)
    found = close(name, names, most=1, cutoff=0.4)
    nearest = f"; nearest: {found[0]!r}" if found else ""
    more = f", ... ({len(names)} in all)" if len(names) > MOST_LISTED else ""
    return f"unknown {what} {name!r}{nearest}; allowed: {', '.join(names[:MOST_LISTED]) or 'none found'}{more}"
