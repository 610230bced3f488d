"""SIGTERM and Ctrl-C as a request to save and leave, seen between two steps, by all processes between the same two."""

from __future__ import annotations

import signal
import threading
from typing import Any

import errors
from training.distributed import processes


class Preempted(Exception):
    """The run was asked to stop and has saved its state; the same command continues it."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.exit_code = errors.INTERRUPTED if number == signal.SIGINT else errors.AGAIN


class Signals:
    """Notes the first SIGTERM or SIGINT while active; a second Ctrl-C interrupts at once.

    Of several processes all stop, after the same step, when one receives a signal.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[int, Any] = {}
        self._others = processes.connection()

    def after(self, step: int) -> int | None:
        """The signal for which to save and leave after `step`, or None; to be called after every step.

        For a process that stops because another one was asked to, it is SIGTERM.
        """
        if self._others is None:
            return self._received
        return (self._received or signal.SIGTERM) if self._others.stops_after(step) else None

    def _note(self, number: int, frame: Any) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number
        if self._others is not None:
            self._others.request_stop()

    def __enter__(self) -> Signals:
        # Python delivers signals to the main thread only; a loop in another thread cannot be asked this way.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
