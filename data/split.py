"""Split names with slices, as in TFDS: `train`, `train[:90%]`, `test[100:200]`, `train[80%:]+test`."""

import re
from collections.abc import Callable, Mapping

from data.names import unknown
from data.source import Selection, Source

_PART = re.compile(r"(?P<name>[^\[\]+]+)(\[(?P<low>-?\d+%?)?:(?P<high>-?\d+%?)?\])?")


def parse_split(split: str, sizes: Mapping[str, int]) -> list[tuple[str, range]]:
    """The (name, examples) that `split` chooses, given the size of every split.

    Percentages are rounded to the nearest example, negative bounds count from the end. Raises ValueError for a split
    that does not exist (the message lists those that do), a malformed slice, or one that holds no example.
    """
    chosen = []
    for part in split.split("+"):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"split {split!r} must be NAME, NAME[low:high] or NAME[low%:high%], with + between")
        name = match["name"].strip()
        if name not in sizes:
            raise ValueError(unknown("split", name, sizes))
        size = sizes[name]
        low, high = _bound(match["low"], size, 0), _bound(match["high"], size, size)
        if low >= high:
            raise ValueError(f"split {split!r} holds no example: {name} has {size}")
        chosen.append((name, range(low, high)))
    return chosen


def _bound(text: str | None, size: int, default: int) -> int:
    if text is None:
        return default
    value = round(int(text[:-1]) * size / 100) if text.endswith("%") else int(text)
    return min(max(value + size if text.startswith("-") else value, 0), size)


def select(split: str, sizes: Mapping[str, int], open_whole: Callable[[str], Source]) -> Source:
    """Opens the whole splits that `split` names and cuts them; `open_whole(name)` opens one."""
    parts = [(open_whole(name), chosen) for name, chosen in parse_split(split, sizes)]
    if len(parts) == 1 and len(parts[0][1]) == len(parts[0][0]):
        return parts[0][0]
    return Selection(parts, split)
