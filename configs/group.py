"""A group of keys as an experiment file sees it: it knows its keys, and where each of them was set."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

import errors
from naming import hint

_PASSED = ("ml_collections", __name__)


class UnknownKey(AttributeError):
    """A key that nobody declared; the message is `config.KEY: no such key` with the nearest."""


class Group(ConfigDict):
    """A `ConfigDict` whose unknown keys are refused in one line, and that notes the place of every assignment.

    Args:
      prefix: of its keys, such as `"optim."`.
      places: `{dotted key: FILE:LINE}` of all groups of one configuration, filled as values are set; what was set last
        is last.
    """

    def __init__(self, values: Mapping[str, Any] | None = None, prefix: str = "", places: dict[str, str] | None = None):
        object.__setattr__(self, "_prefix", prefix)
        object.__setattr__(self, "places", {})  # what the defaults are set in is of no interest
        # Types are checked by `configs.load`, with better messages and with durations written as text.
        super().__init__(values, type_safe=False)
        object.__setattr__(self, "places", {} if places is None else places)

    def __setitem__(self, key: Any, value: Any) -> None:
        if self.is_locked and isinstance(key, str) and "." not in key:
            self._check(key)
        # A group that takes the place of one of ours is as free as what a file would make itself.
        super().__setitem__(key, ConfigDict(value, type_safe=False) if isinstance(value, dict) else value)
        self.places.pop(name := f"{self._prefix}{key}", None)
        self.places[name] = _place()

    def __setattr__(self, key: str, value: Any) -> None:
        self._check(key)
        super().__setattr__(key, value)

    def __getattr__(self, key: str) -> Any:
        if not key.startswith("_"):
            self._check(key)
        return super().__getattr__(key)

    def _check(self, key: str) -> None:
        if self.is_locked and key not in self._fields:
            known = hint(key, self._fields) or "; there are: " + " ".join(self._fields)
            raise UnknownKey(f"config.{self._prefix}{key}: no such key{known}")


def _place() -> str:
    """`FILE:LINE` of whoever sets a value."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_PASSED):
        frame = frame.f_back
    return f"{errors.short(frame.f_code.co_filename)}:{frame.f_lineno}"
