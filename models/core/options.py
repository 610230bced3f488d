"""Options of models: frozen dataclasses whose fields say what they may be, checked once where they enter.

A field's type is the check: `Rate` is a number in [0, 1), `Count` an integer from 1 on, `Size` one from 0 on, and a
sequence of these has such entries. What depends on several fields is checked by the class itself.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

from models.core.errors import unknown_name


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a value may be: a test, and the same in words."""

    words: str
    test: Callable[[Any], bool]


Rate = Annotated[float, Kind("a number of at least 0 and below 1", lambda v: _is_number(v) and 0 <= v < 1)]
"""A share of what is dropped."""
Count = Annotated[int, Kind("an integer of at least 1", lambda v: _is_integer(v) and v >= 1)]
Size = Annotated[int, Kind("an integer of at least 0", lambda v: _is_integer(v) and v >= 0)]
Positive = Annotated[float, Kind("a number above 0", lambda v: _is_number(v) and v > 0)]
Flag = Annotated[bool, Kind("True or False", lambda v: isinstance(v, bool))]
Pair = Count | tuple[Count, Count]
"""A side, or (rows, columns)."""


class Frozen(dict):
    """A dictionary that nobody changes, so that what has one in it can be hashed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


def frozen(value: Any) -> Any:
    """Mappings and sequences in a form that can be hashed, all the way down."""
    if isinstance(value, Mapping):
        return Frozen((name, frozen(entry)) for name, entry in value.items())
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value


def check(options: Any) -> None:
    """Every field of a frozen dataclass is of its kind. What can be changed from outside is copied.

    Raises:
      ValueError: naming the field, with what is allowed.
    """
    kind: Any = type(options)
    for name, hint in _hints(kind).items():
        value = getattr(options, name)
        if not _fits(value, hint):
            raise ValueError(f"{name}={value!r}; allowed: {' or '.join(dict.fromkeys(_words(hint)))}")
        object.__setattr__(options, name, frozen(value))


def check_choices(**choices: tuple[Any, Iterable[str]]) -> None:
    """Options by name, `option=(value, allowed)`. ValueError, with the nearest, for one that there is not."""
    for option, (value, allowed) in choices.items():
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(unknown_name(option, str(value), allowed))


def check_stages(**by_stage: Sequence[Any]) -> None:
    """One entry for each stage in all of them. ValueError naming the first and those that differ from it."""
    first = next(iter(by_stage))
    wrong = [name for name, values in by_stage.items() if len(values) != len(by_stage[first])]
    if wrong:
        given = " and ".join(f"{name}={tuple(by_stage[name])}" for name in [first, *wrong])
        raise ValueError(f"{given}: one entry for each stage is needed")


def each(name: str, value: Any, stages: int) -> list[Any]:
    """A value for all stages, or a sequence with one for each, as a list. ValueError for another number of entries."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != stages:
            raise ValueError(f"{name}={value!r}: one entry for each of the {stages} stages is needed")
        return list(value)
    return [value] * stages


def pair(value: Any) -> tuple[int, int]:
    """Rows and columns of a side or of both."""
    return (value, value) if _is_integer(value) else (value[0], value[1])


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _parts(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    return any(_fits_one(value, part) for part in _parts(hint))


def _fits_one(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return value is None
    if origin is Annotated:
        return all(kind.test(value) for kind in hint.__metadata__ if isinstance(kind, Kind))
    if origin is tuple:
        inner = [part for part in arguments if part is not ...]
        if not isinstance(value, tuple | list) or (... not in arguments and len(value) != len(inner)):
            return False
        return all(_fits(entry, inner[0 if ... in arguments else i]) for i, entry in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return isinstance(value, tuple | list) and all(_fits(entry, arguments[0]) for entry in value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    return _PLAIN[hint].test(value) if hint in _PLAIN else True


def _words(hint: Any) -> list[str]:
    words: list[str] = []
    for part in _parts(hint):
        origin, arguments = typing.get_origin(part), typing.get_args(part)
        if part is type(None):
            words.append("None")
        elif origin is Annotated:
            words += [kind.words for kind in part.__metadata__ if isinstance(kind, Kind)]
        elif origin is tuple or (isinstance(origin, type) and issubclass(origin, Sequence)):
            words.append(f"several, each {' or '.join(_words(arguments[0]))}")
        elif isinstance(origin, type) and issubclass(origin, Mapping):
            words.append("a dictionary")
        else:
            words.append(_PLAIN[part].words if part in _PLAIN else getattr(part, "__name__", str(part)))
    return words


_PLAIN: dict[Any, Kind] = {
    str: Kind("a name", lambda v: isinstance(v, str)),
    int: Kind("an integer", _is_integer),
    float: Kind("a number", _is_number),
    bool: Kind("True or False", lambda v: isinstance(v, bool)),
}
"""What values of fields without a kind of their own may be."""
