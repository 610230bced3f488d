"""Names in messages: the one line that answers a misspelt one, and those of files that are not UTF-8."""

from collections.abc import Iterable

import naming


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`; nearest: 'flip'` for the name that is most like it, or nothing."""
    close = naming.close(name, allowed, most=1, cutoff=0.4)
    return f"; nearest: {close[0]!r}" if close else ""


def printable(name: str) -> str:
    r"""The name of a file as text that can be printed and stored: bytes that are not UTF-8 are written as `\xf1`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
