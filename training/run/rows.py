"""Files of one JSON object a line, which a run adds to and a resumed run continues; what is damaged is left out."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.checkpoints import json_text
from training.checkpoints.whole import set_aside, write_whole


def read(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The rows of a file, and whether more is damaged than a last line that is cut off; no file is no rows."""
    if not path.exists():
        return [], False
    if not path.is_file():
        return [], True
    rows, damaged = [], False
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json_text.parse(line)
            whole = isinstance(row["step"], int)
        except (ValueError, KeyError):
            whole = False
        # A killed process leaves its last line half written, sometimes as far as the end of the object.
        if line.endswith(b"\n") and whole:
            rows.append(row)
        elif line.endswith(b"\n"):
            damaged = True
    return rows, damaged


class Jsonl:
    """A file of rows that a resumed run continues: rows after its step are taken back.

    Attributes:
      rows: those that were there and stay.
    """

    def __init__(self, path: Path, resume_step: int):
        self.path = path
        found, damaged = read(path)
        self.rows = [row for row in found if row["step"] <= resume_step]
        if damaged:
            kept = set_aside(path)
            print(
                f"{path}: damaged; {len(self.rows)} whole lines are kept, the rest is in {kept.name}", file=sys.stderr
            )
        if damaged or path.exists():
            write_whole(path, "".join(json_text.text(row) + "\n" for row in self.rows))
        self._file = path.open("a", buffering=1)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one object; a number that is not finite becomes null."""
        self._file.write(json_text.text(row) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
