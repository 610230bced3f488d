"""Progress of a run for a person, on a terminal or in a file. Light: it is there before JAX is imported."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

QUIET_SECONDS = 2.5
"""So long may nothing be written before a line says what is being done."""
RENEWED_SECONDS = 0.5


def format_time(seconds: float) -> str:
    """Writes a duration as `42s`, `3m07s` or `2h05m`."""
    seconds = int(seconds + 0.5)
    if seconds < 60:
        return f"{seconds}s"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds < 3600 else f"{seconds // 3600}h{seconds // 60 % 60:02d}m"


@dataclasses.dataclass(eq=False)
class _Doing:
    """Something that takes time: how far it is where that is known, else since when it lasts."""

    what: str
    begin: float = dataclasses.field(default_factory=time.perf_counter)
    part: str = ""
    said: bool = False

    def __str__(self) -> str:
        return self.part or f"{self.what} ... {format_time(time.perf_counter() - self.begin)}"


class Terminal:
    """Progress for a person: one line that renews itself on a terminal, one plain line per report elsewhere."""

    wrote = time.perf_counter()  # when anything was last written, by whichever of them

    def __init__(self, stream: TextIO | None = None, quiet: bool = False):
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.quiet = quiet
        self._open = False
        self._doing: list[_Doing] = []
        self._lock = threading.RLock()

    def say(self, text: str) -> None:
        """Writes a line that stays."""
        if self.quiet:
            return
        with self._lock:
            self._write(("\r\x1b[K" if self._open else "") + text + "\n")
            self._open = False

    def progress(
        self,
        step: int,
        total: int,
        row: Mapping[str, Any],
        *,
        shown: Sequence[str] = (),
        losses: Sequence[str] = (),
        unit: str,
    ) -> None:
        """Shows step, loss, speed, remaining time and the share of time spent waiting for data; what is None was not
        measured and is left out.

        Args:
          shown: further values of the row.
          losses: names of several losses, shown in place of their sum.
          unit: what `<unit>_per_second` counts.
        """
        if self.quiet:
            return
        parts = [f"step {step}/{total}"]
        digits = {**dict.fromkeys(losses or ["loss"], 4), **dict.fromkeys(shown, 3)}
        parts += [f"{name} {row[name]:.{places}f}" for name, places in digits.items() if row.get(name) is not None]
        if row.get("skipped_steps"):
            parts.append(f"skipped {row['skipped_steps']}")
        parts += [
            f"lr {row['learning_rate']:.2e}",
            f"{row[f'{unit}_per_second']:.0f} {unit}/s",
            f"ETA {format_time(row['eta_seconds'])}",
            f"data wait {row['data_wait']:.1%}",
        ]
        if not self.live:
            self.say("  ".join(parts))
            return
        self._renew(_bar(step, total) + "  ".join(parts))

    def part(self, what: str, done: int, total: int) -> None:
        """Shows how far something is that ends soon, such as an evaluation; on a terminal only."""
        if self.live and not self.quiet:
            text = f"{_bar(done, total)}{what} {done}/{total}"
            if self._doing:
                self._doing[-1].part = text
            self._renew(text)

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Shows `what` with the seconds it takes while the block runs, though that may hold this thread, and in its
        place what begins inside of it; elsewhere than on a terminal it is one line, if nothing was written for long.
        """
        if self.quiet:
            yield
            return
        doing, ended = _Doing(what), threading.Event()
        self._doing.append(doing)
        if self.live:
            self._renew(str(doing))
        watcher = threading.Thread(target=self._watch, args=(doing, ended), name="terminal", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join(1)  # whatever keeps it, the work is done
            self._doing.remove(doing)
            self.clear()

    def _watch(self, doing: _Doing, ended: threading.Event) -> None:
        while not ended.wait(RENEWED_SECONDS):
            if self._doing[-1] is not doing:
                continue
            if self.live:
                self._renew(str(doing))
            elif not doing.said and time.perf_counter() - Terminal.wrote > QUIET_SECONDS:
                doing.said = True
                self.say(f"{doing.what} ...")

    def clear(self) -> None:
        """Takes away the line that renews itself."""
        with self._lock:
            if self._open:
                self._renew("")
                self._open = False

    def _renew(self, line: str) -> None:
        with self._lock:
            self._write("\r\x1b[K" + line + "\r")  # back at its begin: a note on stderr is written over it
            self._open = True

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
        Terminal.wrote = time.perf_counter()


def _bar(done: int, total: int) -> str:
    filled = int(20 * done / max(total, 1))
    return f"[{'#' * filled}{'.' * (20 - filled)}] "
