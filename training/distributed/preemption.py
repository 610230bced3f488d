"""SIGTERM and Ctrl-C as a request to leave, with the state saved: when it is served, and how soon.

Between two steps, all processes of a run save the same step and leave. Where there is nothing to save, or everything is
saved (before the first step, in evaluations), they leave at once. Python runs a signal's handler between two of its own
instructions in the main thread, so what stays in C++ for long, as a compilation does, runs in another one.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import errors
from training.distributed import processes

TICK_SECONDS = 0.1
Result = TypeVar("Result")


class Preempted(BaseException):
    """The run was asked to stop; the same command continues it. Not an `Exception`: nothing may take it for a failure.

    Attributes:
      together: whether all processes of the run leave by themselves now; else they have to be told.
    """

    def __init__(self, message: str, number: int, together: bool = True):
        super().__init__(message)
        self.number, self.together = number, together
        self.exit_code = errors.INTERRUPTED if number == signal.SIGINT else errors.AGAIN


class Signals:
    """Notes the first SIGTERM or SIGINT while active; from then on Ctrl-C ends the process, whatever it does.

    Of several processes all stop, after the same step, when one receives a signal.
    """

    _active: Signals | None = None  # the innermost

    def __init__(self) -> None:
        self._received: int | None = None
        self._at_once: str | None = None
        self._previous: dict[int, Any] = {}
        self._outer: Signals | None = None

    def after(self, step: int) -> int | None:
        """The signal for which to save and leave after `step`, or None; to be called after every step.

        For a process that stops because another one was asked to, it is SIGTERM.
        """
        others = processes.connection()
        if others is None:
            return self._received
        return (self._received or signal.SIGTERM) if others.stops_after(step) else None

    @contextlib.contextmanager
    def at_once(self, said: str) -> Iterator[None]:
        """Within, a signal raises `Preempted` wherever the program is, and one that came before does on entry.

        Args:
          said: what the message says after the number of the signal.
        """
        before, self._at_once = self._at_once, said
        try:
            if self._received is not None:
                raise Preempted(f"signal {self._received} {said}", self._received, together=False)
            yield
        finally:
            self._at_once = before

    def _note(self, number: int, frame: Any) -> None:
        if self._received is None:
            self._received = number
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._at_once is not None:
            raise Preempted(f"signal {number} {self._at_once}", number, together=False)
        if (others := processes.connection()) is not None:
            others.request_stop()

    def __enter__(self) -> Signals:
        self._outer, Signals._active = Signals._active, self
        # Python delivers signals to the main thread only; a loop in another thread cannot be asked this way.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: Any) -> None:
        Signals._active = self._outer
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def finishing() -> Iterator[None]:
    """Within, what has been begun is ended: files of one result are all written, or none is."""
    signals = Signals._active
    if signals is None:
        yield
        return
    before, signals._at_once = signals._at_once, None
    try:
        yield
    finally:
        signals._at_once = before


def interruptible(function: Callable[[], Result]) -> Result:
    """The result of `function()`, which runs in a thread of its own, so that a signal is served while it does."""
    results: list[Result] = []
    failures: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        try:
            results.append(function())
        except BaseException as error:
            failures.append(error)
        finally:
            done.set()

    threading.Thread(target=work, name=_THREAD, daemon=True).start()
    while not done.wait(TICK_SECONDS):
        pass
    if failures:
        raise failures[0]
    return results[0]


def still_working() -> bool:
    """Whether what a signal cut short still runs; Python cannot end it, nor end while it does."""
    return any(thread.name == _THREAD for thread in threading.enumerate())


_THREAD = "interruptible"
