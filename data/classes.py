"""Classes are known by their names: where those of one set or model are among those of another.

Two lists of names are of the same classes if the names are the same, also where only case, `_`, `-` and spaces or the
Unicode form differ (macOS decomposes letters). The 1000 classes of ImageNet are known by WordNet synset
(`n01440764`, as folders are called) and by name (`tench`); a list that is the numbers from 0 on is places in the other.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

import naming
from data.source import ExampleError, Info, Record, Source

IGNORED_MASK = 255
"""Pixels of a mask without truth, whatever the classes."""


def locate(names: Sequence[str], among: Sequence[str]) -> tuple[int, ...]:
    """The place of each of `names` in `among`, which may have more.

    Raises:
      ValueError: some are not there, or two would be the same; one line with the first few.
    """
    if list(names) == list(among):
        return tuple(range(len(names)))
    for read in (_unicode, _spelling):
        if (found := _places([read(name) for name in names], [read(name) for name in among])) is not None:
            return found
    numbers = _numbers(names), _numbers(among)
    if numbers[0] and len(names) == len(among):
        return numbers[0]
    if numbers[1] and len(names) == len(among):
        return tuple(np.argsort(numbers[1]).tolist())
    ours, theirs = imagenet_places(names), imagenet_places(among)
    if ours and theirs and (found := _places(ours, theirs)) is not None:
        return found
    raise ValueError(_difference(names, among))


def moved(before: Sequence[str], now: Sequence[str]) -> int | None:
    """The first label that does not mean the class that it meant; None where each does. Both are equally long."""
    try:
        if locate(before, now) == tuple(range(len(now))):
            return None
    except ValueError:
        pass
    differ = [
        label for label, (old, new) in enumerate(zip(before, now, strict=True)) if _spelling(old) != _spelling(new)
    ]
    return differ[0] if differ else 0


def places(inner: Info, outer: Info, what: str = "the model") -> tuple[int, ...]:
    """Where each class of `inner` is among those of `outer`: by name if both have names, else by number.

    Args:
      what: whose classes `outer`'s are, for messages.

    Raises:
      ValueError: a class is not there, or one side has no names and the numbers of classes differ; one line.
    """
    counts = f"{inner.name!r} has {inner.num_classes} classes, {what} {outer.num_classes}"
    if _named(inner) and _named(outer):
        try:
            return locate(inner.class_names, outer.class_names)
        except ValueError as error:
            raise ValueError(f"{counts}, and {error}") from None
    if inner.num_classes != outer.num_classes:
        raise ValueError(counts)
    return tuple(range(inner.num_classes or 0))


def _named(info: Info) -> bool:
    return bool(info.class_names) and len(info.class_names) == info.num_classes


def described(found: Sequence[int], count: int) -> str:
    """What `places` found, for the user: "" where every class of the `count` is at its own place."""
    if len(found) < count:
        return f"{len(found)} of {count} classes, matched by name"
    return "" if list(found) == list(range(count)) else "the same classes in another order, matched by name"


def check_same(before: Mapping[str, Any], now: Info, where: str) -> None:
    """Refuses data in which a label means another class than it did.

    Args:
      before: `num_classes` and `class_names` as a run or a checkpoint noted them.
      where: whose they are, for the message.

    Raises:
      ValueError: the first difference, in one line.
    """
    names, count = tuple(before.get("class_names", ())), before.get("num_classes")
    advice = "give it the data it had, or start another workdir with config.model.init_from"
    if count != now.num_classes:
        raise ValueError(f"{where}: its data had {count} classes and has {now.num_classes} now; {advice}")
    if len(names) != count or len(now.class_names) != count:
        return
    if (label := moved(names, now.class_names)) is not None:
        old, new = names[label], now.class_names[label]
        raise ValueError(f"{where}: label {label} was {old!r} and is {new!r} in {now.name!r} now; {advice}")


def labelled_as(source: Source, info: Info) -> Source:
    """The source with the labels of `info`: itself where they are the same already.

    Raises:
      ValueError: it has classes that `info` lacks (`places`).
    """
    found = places(source.info, info)
    if list(found) == list(range(info.num_classes or 0)):
        return source
    return Relabelled(source, info, found)


class Relabelled(Source):
    """Another source with the class numbers of `info`: of the field `label` or, without one, of the masks."""

    def __init__(self, source: Source, info: Info, found: Sequence[int]):
        self._source = source
        self._table = np.asarray(found, np.int64)
        kinds = source.info.kinds
        self._masks = () if "label" in kinds else tuple(name for name, kind in kinds.items() if kind == "mask")
        self.info = replace(source.info, num_classes=info.num_classes, class_names=info.class_names)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        record = dict(self._source[index])
        if "label" in record:
            if not 0 <= (label := int(record["label"])) < len(self._table):
                raise ExampleError(f"label {label} of {self.describe(index)} is not in 0..{len(self._table) - 1}")
            record["label"] = int(self._table[label])
        for name in self._masks:
            mask = np.asarray(record[name])
            known = mask != IGNORED_MASK
            record[name] = np.where(known, self._table[np.where(known, mask, 0)], mask).astype(mask.dtype)
        return record

    @override
    def describe(self, index: int) -> str:
        return self._source.describe(index)


def imagenet() -> tuple[str, ...]:
    """The synsets of ImageNet's 1000 classes in the order of their labels, which is the sorted one."""
    return tuple(synset for synset, _ in _imagenet())


def imagenet_places(names: Sequence[str]) -> tuple[int, ...] | None:
    """ImageNet's labels of classes by synset or name; None where one is not ImageNet's.

    A name that two classes share ("crane", the bird and the machine) says nothing, but in a whole list of 1000 it is
    that of its place.
    """
    classes, labels = _imagenet(), _imagenet_labels()
    found = []
    for place, name in enumerate(names):
        spelled, first = _spelling(name), _spelling(name.split(",")[0])
        candidates = labels.get(spelled) or labels.get(first, ())
        if len(names) == len(classes) and first in map(_spelling, classes[place][1].split(",")):
            found.append(place)
        elif len(candidates) == 1:
            found.append(candidates[0])
        else:
            return None
    return tuple(found)


@functools.cache
def _imagenet() -> tuple[tuple[str, str], ...]:
    """(synset, its words) of each class."""
    lines = Path(__file__).with_name("imagenet_classes.txt").read_text().splitlines()
    return tuple((line[:9], line[10:]) for line in lines)


@functools.cache
def _imagenet_labels() -> dict[str, tuple[int, ...]]:
    """Labels by synset, by all words of a class, by the first of them, and by the others: what comes first counts."""
    labels: dict[str, tuple[int, ...]] = {}
    kinds: tuple[Callable[[str, str], list[str]], ...] = (
        lambda synset, words: [synset],
        lambda synset, words: [words],
        lambda synset, words: words.split(", ")[:1],
        lambda synset, words: words.split(", ")[1:],
    )
    for names in kinds:
        found: dict[str, tuple[int, ...]] = {}
        for label, row in enumerate(_imagenet()):
            for name in map(_spelling, names(*row)):
                found[name] = (*found.get(name, ()), label)
        labels = {**found, **labels}
    return labels


def _unicode(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _spelling(name: str) -> str:
    return " ".join(_unicode(name).casefold().replace("_", " ").replace("-", " ").split())


def _places(names: Sequence[str | int], among: Sequence[str | int]) -> tuple[int, ...] | None:
    """None where a name is not there, or where names are not all different."""
    table = {name: place for place, name in enumerate(among)}
    if len(table) < len(among) or len(set(names)) < len(names) or not table.keys() >= set(names):
        return None
    return tuple(table[name] for name in names)


def _numbers(names: Sequence[str]) -> tuple[int, ...]:
    """The names as numbers if they are those from 0 on in any order, else nothing."""
    if not all(name.isascii() and name.isdigit() for name in names):
        return ()
    numbers = tuple(map(int, names))
    return numbers if sorted(numbers) == list(range(len(names))) else ()


def _difference(names: Sequence[str], among: Sequence[str]) -> str:
    known = {_spelling(name) for name in among}
    missing = [name for name in names if _spelling(name) not in known]
    if not missing:
        return f"names that are alike cannot be told apart ({_shown(names)}; {_shown(among)})"
    close = naming.close(missing[0], among, most=1)
    nearest = f"; nearest: {close[0]!r}" if close else ""
    more = f" ({len(missing)} of {len(names)} classes are not)" if len(missing) > 1 else ""
    return f"{missing[0]!r} is not among {_shown(among)}{more}{nearest}"


def _shown(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")
