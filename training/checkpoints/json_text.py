"""The one way in which results are written as JSON and read again.

A number that JSON does not have, NaN or an infinity, is null: Python's own writer puts `NaN` and
`Infinity` into the text, which no other reader of JSON takes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from training.checkpoints.whole import write_whole


def plain(value: Any) -> Any:
    """The value as JSON has it: text keys, lists, Python's numbers, and None for a number that is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def text(value: Any, indent: int | None = None) -> str:
    """The value as JSON text, of one line without `indent`.

    Raises:
      TypeError: it holds something that is neither text, number, list, mapping nor None.
    """
    return json.dumps(plain(value), indent=indent, allow_nan=False)


def parse(content: str | bytes) -> dict[str, Any]:
    """The one object that a text holds.

    Raises:
      ValueError: it is no JSON, or something else than an object.
    """
    try:
        found = json.loads(content)
    except RecursionError:  # of Python's own reader, by a text that was never written by anybody
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"it holds no JSON object but {str(content[:20])!r}")
    return found


def read(path: Path) -> dict[str, Any]:
    """The object in a file. ValueError as for `parse`; OSError where there is none."""
    return parse(path.read_bytes())


def write(path: Path, value: Any) -> None:
    """Writes a value for people and programs, in one piece."""
    write_whole(path, text(value, indent=1) + "\n")
