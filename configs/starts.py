"""Where the parameters of a run come from: one place, or several that each start a part of the model."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

import naming

ALLOWED = (
    "a workdir, a checkpoint or a file of weights, or a list of these and of mappings such as "
    "{'source': 'runs/a', 'prefix': {'encoder': 'image'}, 'only': 'image.blocks'}"
)
KEYS = ("source", "prefix", "only", "weights")
WEIGHTS = ("auto", "raw", "ema")
"""Which of several sets of weights: the average of a run that has one and the only ones of a file, raw, or averaged."""


class Starts:
    """The kind of a key whose value is one text, empty for nothing, or a tuple of texts and mappings.

    The keys of a mapping: `source`, as the text; `prefix`, `{beginning of their names: that of ours}`; `only`, a
    regular expression of our parameters; `weights`, one of `WEIGHTS`. Only the first has to be there.
    """

    @staticmethod
    def parse(value: Any) -> str | tuple[str | dict[str, Any], ...]:
        """Reads a text, `"a,b"`, a list, a mapping, or one of the last two written in Python or JSON.

        Raises:
          TypeError: none of these.
          ValueError: a mapping has another key, or a value that the key does not take; one line that says which.
        """
        if isinstance(value, str):
            if not value.strip().startswith(("[", "{", "(")):
                found = [part.strip() for part in value.split(",") if part.strip()]
                return found[0] if len(found) == 1 else tuple(found) or ""
            value = _literal(value)
        entries = [value] if isinstance(value, Mapping) else value
        if not isinstance(entries, list | tuple):
            raise TypeError
        checked = tuple(_entry(entry) for entry in entries)
        one = checked[0] if len(checked) == 1 else None
        return one if isinstance(one, str) and "," not in one else checked or ""


def _literal(text: str) -> Any:
    for read in (ast.literal_eval, json.loads):
        try:
            return read(text.strip())
        except (ValueError, SyntaxError):
            continue
    raise ValueError(f"{text!r} cannot be read as Python or JSON")


def _entry(entry: Any) -> str | dict[str, Any]:
    if isinstance(entry, str) and entry:
        return entry
    if not isinstance(entry, Mapping):
        raise TypeError
    for key in entry:
        if key not in KEYS:
            raise ValueError(f"{naming.unknown('key', str(key), KEYS)} (in {dict(entry)})")
    if not isinstance(entry.get("source"), str) or not entry["source"]:
        raise ValueError(f"{dict(entry)} has no 'source': a workdir, a checkpoint or a file of weights")
    found: dict[str, Any] = {"source": entry["source"]}
    if "prefix" in entry:
        prefix = entry["prefix"]
        if not (isinstance(prefix, Mapping) and prefix):
            raise ValueError(
                f"prefix={prefix!r}: takes a mapping of beginnings of names, such as {{'encoder': 'image'}}"
            )
        if not all(isinstance(part, str) for pair in prefix.items() for part in pair):
            raise ValueError(f"prefix={dict(prefix)}: takes text")
        # A beginning ends at a dot, written or not.
        found["prefix"] = {theirs.rstrip("."): ours.rstrip(".") for theirs, ours in prefix.items()}
    if "only" in entry:
        try:
            re.compile(entry["only"])
        except (re.error, TypeError) as error:
            raise ValueError(f"only={entry['only']!r} is not a regular expression: {error}") from None
        found["only"] = entry["only"]
    if "weights" in entry:
        if entry["weights"] not in WEIGHTS:
            raise ValueError(naming.unknown("weights", str(entry["weights"]), WEIGHTS))
        found["weights"] = entry["weights"]
    return found
