"""Compilation before the first call: a signal is served while it lasts, and the terminal shows that it does."""

from __future__ import annotations

import time
from typing import Any

from training.distributed import preemption
from training.run.terminal import Terminal

spent = 0.0  # seconds of this process, for whoever accounts for time


def ahead(jitted: Any, *arguments: Any, what: str, terminal: Terminal | None = None) -> Any:
    """Compiles a jitted function for arguments like these; calls of it then find it compiled.

    Tracing stays in this thread, since what is set for a thread (precision, a mesh) is part of what is traced.

    Args:
      what: what the terminal calls it.

    Returns:
      The traced function, whose `jaxpr` says what it computes.
    """
    global spent
    begin = time.perf_counter()
    terminal = terminal or Terminal(quiet=True)
    with terminal.busy(f"compiling {what}"):
        traced = jitted.trace(*arguments)
        preemption.interruptible(traced.lower().compile)
    spent += time.perf_counter() - begin
    return traced


class Ahead:
    """A jitted function that is compiled in this way when it is called first."""

    def __init__(self, jitted: Any, what: str, terminal: Terminal | None = None):
        self.jitted, self.what, self.terminal = jitted, what, terminal
        self._compiled = False

    def __call__(self, *arguments: Any) -> Any:
        if not self._compiled:
            ahead(self.jitted, *arguments, what=self.what, terminal=self.terminal)
            self._compiled = True
        return self.jitted(*arguments)
