"""What somebody may have meant who misspelt a name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

MOST_LISTED = 20


def close(name: str, names: Iterable[str], most: int = 3, cutoff: float = 0.5) -> list[str]:
    """Known names that resemble `name`, best first: those whose words begin with its letters (`lr` for
    `learning_rate`), or else those with much the same letters, large or small.

    Args:
      most: at most so many.
      cutoff: least likeness, from 0 (any) to 1 (equal).
    """
    known = [str(n) for n in names]
    initials = [n for n in known if "_" in n and "".join(word[:1] for word in n.split("_")) == name]
    if initials:
        return initials[:most]
    alike: dict[str, list[str]] = {}
    for other in known:
        alike.setdefault(other.casefold(), []).append(other)
    found = difflib.get_close_matches(str(name).casefold(), alike, n=most, cutoff=cutoff)
    return [other for spelling in found for other in alike[spelling]][:most]


def hint(name: str, names: Iterable[str], most: int = 3, cutoff: float = 0.5) -> str:
    """` (nearest: x, y)` for the end of a message, or nothing where no name resembles `name`."""
    found = close(name, names, most, cutoff)
    return f" (nearest: {', '.join(found)})" if found else ""


def beside(path: Path) -> str:
    """`; nearest: /runs/baseline` for a file or folder that is not there, of those in the same folder; or nothing."""
    there = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    return "".join(f"; nearest: {path.parent / name}" for name in close(path.name, there, most=1))


def unknown(what: str, name: str, allowed: Iterable[str]) -> str:
    """`unknown transform 'flop'; nearest: 'flip'; allowed: ...`, the list cut after 20 names."""
    names = sorted(allowed)
    found = close(name, names, most=1, cutoff=0.4)
    nearest = f"; nearest: {found[0]!r}" if found else ""
    more = f", ... ({len(names)} in all)" if len(names) > MOST_LISTED else ""
    return f"unknown {what} {name!r}{nearest}; allowed: {', '.join(names[:MOST_LISTED]) or 'none found'}{more}"
