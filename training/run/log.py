"""What a run writes while it works: terminal lines, metrics.jsonl, TensorBoard, and Weights & Biases if asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tasks import logged
from training.run import rows
from training.run.rows import Jsonl
from training.run.tensorboard import Pictures, Tables, TensorBoard, scalars

__all__ = ["Jsonl", "Terminal", "Writers", "format_time"]


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
            watcher.join()
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


class Writers:
    """Sends rows of scalars to every log that the configuration asks for; only the first process writes.

    Args:
      config: the configuration, for Weights & Biases.
      run_id: names the run of this workdir and no other, for Weights & Biases.
      values: the configuration by dotted key, for TensorBoard.
      metrics: names of the scalars by which TensorBoard compares runs.
    """

    def __init__(
        self,
        folder: Path,
        log: Any,
        config: Mapping[str, Any],
        resume_step: int,
        primary: bool = True,
        run_id: str | None = None,
        *,
        values: Mapping[str, Any] | None = None,
        metrics: Sequence[str] = (),
    ):
        self._jsonl = Jsonl(folder / "metrics.jsonl", resume_step) if primary else None
        self._tensorboard = self._wandb = None
        if self._jsonl and log.tensorboard:
            self._tensorboard = TensorBoard(folder / "tensorboard", self._jsonl.rows, values, metrics)
        if primary and log.wandb:
            try:
                import wandb
            except ImportError as error:
                raise ValueError(
                    f"config.log.wandb={log.wandb}: the package wandb is not installed (pip install wandb), or set "
                    f"it to ''"
                ) from error
            self._wandb = wandb.init(
                project=log.wandb, dir=str(folder), config=dict(config), resume="allow", id=run_id, name=folder.name
            )

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Logs values of one step; `kind` is `train` or `eval/<set>`."""
        row = {"step": step, "kind": kind, "time": round(time.time(), 3), **values}
        if self._jsonl:
            self._jsonl.write(row)
        numbers = scalars(kind, values)
        if self._tensorboard:
            self._tensorboard.write(step, numbers)
        if self._wandb:
            self._wandb.log(numbers, step=step)

    def show(self, step: int, kind: str, tables: Tables, pictures: Pictures) -> None:
        """Logs what a task has to show of an evaluated set, where there is a log that shows it."""
        if self._tensorboard:
            self._tensorboard.show(step, kind, tables, pictures)
        if self._wandb:
            import wandb

            made: dict[str, Any] = {}
            for name, (columns, lines) in tables.items():
                made[f"{kind}/{name}"] = wandb.Table(columns=list(columns), data=[list(line) for line in lines])
            if pictures:
                made[f"{kind}/pictures"] = [logged.on_wandb(wandb, picture, caption) for caption, picture in pictures]
            if made:
                self._wandb.log(made, step=step)

    @property
    def shows(self) -> bool:
        """Whether there is a log that shows tables and pictures."""
        return bool(self._tensorboard or self._wandb)

    def had(self, step: int, kind: str) -> bool:
        """Whether metrics.jsonl had such a row when the run went on."""
        return any((row["step"], row.get("kind")) == (step, kind) for row in self._jsonl.rows) if self._jsonl else False

    def rows(self, step: int) -> list[dict[str, Any]]:
        """What metrics.jsonl has of a step."""
        return [row for row in rows.read(self._jsonl.path)[0] if row["step"] == step] if self._jsonl else []

    def close(self) -> None:
        """Flushes everything."""
        for writer in (self._jsonl, self._tensorboard):
            if writer:
                writer.close()
        if self._wandb:
            self._wandb.finish()
