"""Lists of what can be chosen by name: tables, wildcards that narrow them, and the command that prints them.

    python -m models 'vit*' 'swin*'

Each folder that has such a list says only what is in it (`models/__main__.py` and its like).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import errors
from naming.command_line import Parser, show
from naming.nearest import hint


@dataclasses.dataclass(frozen=True)
class Table:
    """One kind of thing that has names.

    Attributes:
      what: what they are, in the plural.
      columns: headings.
      rows: texts; the first of each is the name.
    """

    what: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]

    @property
    def names(self) -> list[str]:
        """The first column."""
        return [row[0] for row in self.rows]

    def matching(self, patterns: Sequence[str]) -> Table:
        """The rows whose name fits one of the shell patterns; all of them without a pattern."""
        rows = [row for row in self.rows if not patterns or any(fnmatch.fnmatchcase(row[0], one) for one in patterns)]
        return dataclasses.replace(self, rows=rows)

    def __str__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.columns))]
        return "\n".join(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def sentence(thing: Any) -> str:
    """The first sentence of what a documented object, or a docstring, says of itself, in one line."""
    text = thing if isinstance(thing, str) else inspect.getdoc(thing) or ""
    first = " ".join(text.strip().split("\n\n")[0].split())
    end = first.find(". ")
    return (first if end < 0 else first[:end]).removesuffix(".")


def command(program: str, description: str, tables: Callable[[], Sequence[Table]]) -> int:
    """Prints what fits the patterns on the command line, and returns the exit code.

    Args:
      program: how it is started, `python -m models`.
      description: what `--help` says.
      tables: makes them; called once the command line is known to be sound.
    """
    try:
        parser = Parser(program, description)
        parser.add_argument("pattern", nargs="*", help="names, or patterns such as 'vit*' in quotes; default: all")
        parser.add_argument("--names", action="store_true", help="the names alone, one a line")
        options = parser.parse_args(sys.argv[1:])
        show(_text(tables(), options.pattern, options.names))
        return 0
    except Exception as error:
        code, line = errors.judge(error)
        print(f"error: {line}", file=sys.stderr)
        return code


def _text(tables: Sequence[Table], patterns: Sequence[str], names_alone: bool) -> str:
    known = [name for table in tables for name in table.names]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in known):
            kinds = " or ".join(table.what for table in tables)
            begins = [] if pattern.endswith("*") else [name for name in known if name.startswith(pattern)]
            near = f" (there is '{pattern}*')" if begins and pattern else hint(pattern.strip("*"), known)
            raise ValueError(f"{pattern!r}: fits no name of {kinds}{near or '; without a pattern all are listed'}")
    found = [table for table in (table.matching(patterns) for table in tables) if table.rows]
    if names_alone:
        return "\n".join(name for table in found for name in table.names)
    titles = [f"{table.what}\n" if len(tables) > 1 else "" for table in found]
    return "\n\n".join(f"{title}{table}" for title, table in zip(titles, found, strict=True))
