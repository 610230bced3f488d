"""Names in messages: the one line that answers a misspelt one, and those of files that are not UTF-8."""

import difflib
from collections.abc import Iterable


def unknown(what: str, name: str, allowed: Iterable[str]) -> str:
    """`unknown transform 'flop'; nearest: 'flip'; allowed: ...` (the list cut after 20 names)."""
    names = sorted(allowed)
    shown = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
    return f"unknown {what} {name!r}{nearest(name, names)}; allowed: {shown or 'none found'}"


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`; nearest: 'flip'` for the name that is most like it, whatever its case, or nothing."""
    alike = {other.casefold(): other for other in allowed}
    close = difflib.get_close_matches(name.casefold(), alike, n=1, cutoff=0.4)
    return f"; nearest: {alike[close[0]]!r}" if close else ""


def printable(name: str) -> str:
    r"""The name of a file as text that can be printed and stored: bytes that are not UTF-8 are written as `\xf1`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
