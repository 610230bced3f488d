"""What a run writes while it works: terminal lines, metrics.jsonl, TensorBoard, and Weights & Biases if asked for."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from training.checkpoints import json_text
from training.checkpoints.whole import write_whole

LONG_SECONDS = 5.0


def format_time(seconds: float) -> str:
    """Writes a duration as `42s`, `3m07s` or `2h05m`."""
    seconds = int(seconds + 0.5)
    if seconds < 60:
        return f"{seconds}s"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds < 3600 else f"{seconds // 3600}h{seconds // 60 % 60:02d}m"


class Terminal:
    """Progress for a person: one line that renews itself on a terminal, one plain line per report elsewhere."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False):
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.quiet = quiet
        self._open = False

    def say(self, text: str) -> None:
        """Writes a line that stays."""
        if self.quiet:
            return
        self.stream.write(("\r\x1b[K" if self._open else "") + text + "\n")
        self.stream.flush()
        self._open = False

    def progress(self, step: int, total: int, row: Mapping[str, Any]) -> None:
        """Shows step, loss, speed, remaining time and the share of time spent waiting for data; what is None was not
        measured and is left out.
        """
        if self.quiet:
            return
        parts = [f"step {step}/{total}"]
        shown = {"loss": 4, "top1": 3, "accuracy": 3, "psnr": 3}
        parts += [f"{name} {row[name]:.{digits}f}" for name, digits in shown.items() if row.get(name) is not None]
        if row.get("skipped_steps"):
            parts.append(f"skipped {row['skipped_steps']}")
        parts += [
            f"lr {row['learning_rate']:.2e}",
            f"{row['images_per_second']:.0f} images/s",
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
            self._renew(f"{_bar(done, total)}{what} {done}/{total}")

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[Callable[[], None]]:
        """Shows `what` with the seconds it takes, renewed by the function that is given; elsewhere than on a terminal
        it is one line, if it takes long.
        """
        begin, said = time.perf_counter(), False

        def tick() -> None:
            nonlocal said
            seconds = time.perf_counter() - begin
            if self.live and not self.quiet:
                self._renew(f"{what} ... {format_time(seconds)}")
            elif seconds > LONG_SECONDS and not said:
                said = True
                self.say(f"{what} ...")

        tick()
        try:
            yield tick
        finally:
            self.clear()

    def clear(self) -> None:
        """Takes away the line that renews itself."""
        if self._open:
            self._renew("")
            self._open = False

    def _renew(self, line: str) -> None:
        self.stream.write("\r\x1b[K" + line)
        self.stream.flush()
        self._open = True


def _bar(done: int, total: int) -> str:
    filled = int(20 * done / max(total, 1))
    return f"[{'#' * filled}{'.' * (20 - filled)}] "


class Jsonl:
    """A file of one JSON object a line that a resumed run continues: lines after its step are taken back."""

    def __init__(self, path: Path, resume_step: int):
        self.path = path
        if path.exists():
            kept = []
            for line in path.read_text().splitlines(keepends=True):
                # A line that a killed process left half written is the last one, and its step will be run again.
                if line.endswith("\n") and json.loads(line)["step"] <= resume_step:
                    kept.append(line)
            write_whole(path, "".join(kept))
        self._file = path.open("a", buffering=1)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one object; a number that is not finite becomes null."""
        self._file.write(json_text.text(row) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class Writers:
    """Sends rows of scalars to every log that the configuration asks for; only the first process writes."""

    def __init__(self, folder: Path, log: Any, config: Mapping[str, Any], resume_step: int, primary: bool = True):
        self._jsonl = Jsonl(folder / "metrics.jsonl", resume_step) if primary else None
        self._tensorboard = self._wandb = None
        if primary and log.tensorboard:
            import tensorboardX  # imported here because it costs 0.3 s that evaluation does not need

            self._tensorboard = tensorboardX.SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)
        if primary and log.wandb:
            try:
                import wandb
            except ImportError as error:
                raise ValueError(
                    f"config.log.wandb={log.wandb}: the package wandb is not installed (pip install wandb), or set "
                    f"it to ''"
                ) from error
            self._wandb = wandb.init(
                project=log.wandb, dir=str(folder), config=dict(config), resume="allow", id=folder.name
            )

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Logs values of one step; `kind` is `train` or `eval/<set>`."""
        row = {"step": step, "kind": kind, "time": round(time.time(), 3), **values}
        if self._jsonl:
            self._jsonl.write(row)
        scalars = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
        if self._tensorboard:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(scalars, step=step)

    def rows(self, step: int) -> list[dict[str, Any]]:
        """What metrics.jsonl has of a step."""
        lines = self._jsonl.path.read_text().splitlines() if self._jsonl else []
        return [row for row in map(json.loads, lines) if row["step"] == step]

    def close(self) -> None:
        """Flushes everything."""
        for writer in (self._jsonl, self._tensorboard):
            if writer:
                writer.close()
        if self._wandb:
            self._wandb.finish()
