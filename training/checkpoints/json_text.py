"""The one way in which results are written as JSON: a number that JSON does not have, NaN or an infinity, is null.

Python's own writer puts `NaN` and `Infinity` into the text, which no other reader of JSON takes.
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


def write(path: Path, value: Any) -> None:
    """Writes a value for people and programs, in one piece."""
    write_whole(path, text(value, indent=1) + "\n")
