"""Split names with slices, as in TFDS: `train`, `train[:90%]`, `test[100:200]`, `train[80%:]+test`."""

import re
from collections.abc import Callable, Iterable, Mapping

from data.source import Selection, Source
from naming import unknown

SPELLINGS = {
    "train": ("train", "training", "trainset", "trainingset"),
    "val": ("val", "valid", "validation", "valset", "validset", "validationset", "dev", "devset", "development"),
    "test": ("test", "testing", "testset", "testingset", "eval", "evaluation"),
}
"""How sets call their splits, by the name that is used here; case and the signs between words do not matter."""
_PART = re.compile(r"(?P<name>[^\[\]+]+)(\[(?P<low>-?\d+%?)?:(?P<high>-?\d+%?)?\])?")


def usual_name(name: str) -> str:
    """`train`, `val` or `test` for a usual spelling of these (`Training`, `dev`, `test_set`); else the name itself."""
    plain = re.sub(r"[\s_-]", "", name.casefold())
    return next((usual for usual, spellings in SPELLINGS.items() if plain in spellings), name)


def parse_split(split: str, sizes: Mapping[str, int]) -> list[tuple[str, range]]:
    """The (name, examples) that `split` chooses, given the size of every split.

    A name that is not among them stands for the one that is another spelling of it (`val` for `validation`).
    Percentages are rounded to the nearest example, negative bounds count from the end. Raises ValueError for a split
    that does not exist (the message lists those that do), a malformed slice, or one that holds no example.
    """
    chosen = []
    for match in _parts(split):
        name = find_split(match["name"].strip(), sizes)
        size = sizes[name]
        low, high = _bound(match["low"], size, 0), _bound(match["high"], size, size)
        if low >= high:
            raise ValueError(f"split {split!r} holds no example: {name} has {size}")
        chosen.append((name, range(low, high)))
    return chosen


def names_in(split: str) -> list[str]:
    """The names of the splits that `split` cuts and joins, as they are written. Raises ValueError as `parse_split`."""
    return [match["name"].strip() for match in _parts(split)]


def _parts(split: str) -> list[re.Match[str]]:
    found = []
    for part in split.split("+"):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"split {split!r} must be NAME, NAME[low:high] or NAME[low%:high%], with + between")
        found.append(match)
    return found


def find_split(name: str, known: Iterable[str]) -> str:
    """The one of `known` that has this name, or else the only one whose name is another spelling of it.

    Raises ValueError with the names there are.
    """
    known = list(known)
    alike = [other for other in known if usual_name(other) == usual_name(name)]
    if name not in known and len(alike) != 1:
        raise ValueError(unknown("split", name, known))
    return name if name in known else alike[0]


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
