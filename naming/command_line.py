"""The words of a command line: a parser whose errors are one line, and text that is printed for whoever reads it."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, NoReturn

from naming.nearest import close


class Parser(argparse.ArgumentParser):
    """A command line whose errors are one line like every other, with the nearest flag."""

    def __init__(self, program: str, description: str):
        super().__init__(
            prog=program,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(self, arguments: Any = None, namespace: Any = None) -> Any:
        """As argparse, but an unknown flag is a ValueError that names the nearest."""
        options, unknown = self.parse_known_args(arguments, namespace)
        for action in self._actions:
            # Where a variable of a script was empty, it would be as if the flag were not there.
            if action.option_strings and f"{action.option_strings[-1]}=" in (arguments or ()):
                raise ValueError(f"{action.option_strings[-1]}=: needs a value")
        if unknown:
            raise ValueError(f"{unknown[0]}: no such flag{self.advice(unknown[0])}")
        return options

    def flags(self) -> list[str]:
        """All flags, in the order in which they were declared."""
        return [flag for action in self._actions for flag in action.option_strings]

    def advice(self, word: str) -> str:
        """What follows "no such flag" in the message about a word that nobody knows."""
        near = close(word.split("=")[0], self.flags(), most=1)
        return f" (nearest: {near[0]})" if near else f"; there are: {' '.join(self.flags())}"

    def error(self, message: str) -> NoReturn:
        """Raises instead of leaving."""
        raise ValueError(message)

    def _print_message(self, message: str, file: Any = None) -> None:
        if message:
            show(message.rstrip("\n"))


def show(text: str) -> None:
    """Prints what somebody asked to see, the end of a command that does nothing else.

    A reader that has seen enough (`| head`) ends it quietly. A run that prints while it works is another thing: its log
    going nowhere is for it to say.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python would try again when it leaves, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
