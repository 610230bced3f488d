"""The one line that answers a misspelt name."""

import difflib
from collections.abc import Iterable


def unknown(what: str, name: str, allowed: Iterable[str]) -> str:
    """`unknown transform 'flop'; nearest: 'flip'; allowed: ...` (the list cut after 20 names)."""
    names = sorted(allowed)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"; nearest: {nearest[0]!r}" if nearest else ""
    shown = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
    return f"unknown {what} {name!r}{hint}; allowed: {shown or 'none found'}"


def printable(name: str) -> str:
    r"""The name of a file as text that can be printed and stored: bytes that are not UTF-8 are written as `\xf1`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
