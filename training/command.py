"""What the commands share: setting up JAX, and turning errors into one line and an exit code."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

USER_ERROR, INTERNAL_ERROR = 2, 1
# What bad input raises here; anything else is a fault of this code.
USER_ERRORS = (ValueError, OSError, FloatingPointError, KeyError)


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
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
            raise ValueError(
                f"{unknown[0]}: no such "
                f"flag{f' (nearest: {close[0]})' if close else f'; there are: {chr(32).join(flags)}'}"
            )
        return options

    def error(self, message: str) -> NoReturn:
        """Raises instead of leaving."""
        raise ValueError(message)


def start_jax(cache_directory: str) -> None:
    """Sets up JAX before its first use: a persistent compilation cache, and no chatter from libraries."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import jax

    for name in ("absl", "orbax", "jax", "grain"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if cache_directory:
        folder = Path(cache_directory).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            print(f"no compilation cache: {folder}: {error.strerror}", file=sys.stderr)
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(str(text).split()) or type(error).__name__


def guarded(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Runs `main`; an error becomes one line on stderr, with the traceback only under `--debug`.

    Returns:
      What `main` returns; 2 for bad input, 1 for a fault of this code, 75 after SIGTERM with the state saved, 130
      after Ctrl-C.
    """
    from training.preemption import Preempted

    try:
        return main(arguments)
    except Preempted as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        elif isinstance(error, USER_ERRORS):
            print(f"error: {one_line(error)}", file=sys.stderr)
        else:
            print(f"internal error: {type(error).__name__}: {one_line(error)} (--debug shows where)", file=sys.stderr)
        return USER_ERROR if isinstance(error, USER_ERRORS) else INTERNAL_ERROR
