"""Event files for TensorBoard that hold what `metrics.jsonl` holds, whatever happened to the run."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks import logged
from tasks.base import Picture
from training.checkpoints import json_text
from training.checkpoints.whole import set_aside

FLUSH_SECONDS = 5


Tables = Mapping[str, tuple[Sequence[str], Sequence[Sequence[Any]]]]
Pictures = Sequence[tuple[str, Picture]]
"""What `Task.tables` and `Task.pictures` give."""


def scalars(kind: str, values: Mapping[str, Any]) -> dict[str, int | float]:
    """The numbers of a row by the name that a plot of them has."""
    return {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)}


class TensorBoard:
    """Writes scalars; a resumed run writes those of its rows anew, in place of the files of earlier processes.

    These may lack what a killed process had not yet written, and hold steps that are taken again: only some readers
    leave those out.

    Args:
      folder: of the event files; those in it are replaced.
      rows: of `metrics.jsonl`, as far as they stay.
      values: the configuration by dotted key, for the page that compares runs by their parameters (HPARAMS).
      metrics: names of the scalars that this page shows.
    """

    def __init__(
        self,
        folder: Path,
        rows: Sequence[Mapping[str, Any]],
        values: Mapping[str, Any] | None = None,
        metrics: Sequence[str] = (),
    ):
        if folder.exists() and not folder.is_dir():
            set_aside(folder)
        old = list(folder.glob("events.out.tfevents.*"))
        if old or rows:
            # A viewer that has the old files in memory is told to forget them.
            writer = _writer(folder, purge_step=0)
            for row in rows:
                own = {name: value for name, value in row.items() if name not in ("step", "kind", "time")}
                for name, value in scalars(str(row.get("kind", "")), own).items():
                    writer.add_scalar(name, value, row["step"], walltime=row.get("time"))
            writer.close()  # all is in the file, before the old ones go
        for file in old:
            file.unlink(missing_ok=True)
        self._writer = _writer(folder)
        if values:
            from tensorboardX.summary import hparams

            plain = (str, bool, int, float)
            said = {key: value if isinstance(value, plain) else json_text.text(value) for key, value in values.items()}
            # The third summary says that the run has ended, which nobody knows yet.
            for summary in hparams(said, dict.fromkeys(metrics, 0.0))[:2]:
                self._writer.file_writer.add_summary(summary)

    def write(self, step: int, values: Mapping[str, int | float]) -> None:
        """Adds the scalars of a step; they reach the file within seconds."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def show(self, step: int, kind: str, tables: Tables, pictures: Pictures) -> None:
        """Adds tables as text, and pictures in their order with a list of their captions."""
        for name, (columns, rows) in tables.items():
            lines = [columns, ["---"] * len(columns), *rows]
            text = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
            self._writer.add_text(f"{kind}/{name}", text, step)
        for number, (_, picture) in enumerate(pictures, 1):
            logged.on_tensorboard(self._writer, f"{kind}/pictures/{number}", picture, step)
        if pictures:
            captions = "\n".join(f"{number}. {caption}" for number, (caption, _) in enumerate(pictures, 1))
            self._writer.add_text(f"{kind}/pictures", captions, step)

    def close(self) -> None:
        """Writes the rest and closes the file."""
        self._writer.close()


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return "" if value is None else str(value).replace("|", "\\|")


def _writer(folder: Path, **options: Any) -> Any:
    import tensorboardX  # imported here because it costs 0.3 s that evaluation does not need

    # Files are named by the second otherwise, and one of a quick restart would be written over.
    suffix = f".{uuid.uuid4().hex[:8]}"
    return tensorboardX.SummaryWriter(str(folder), filename_suffix=suffix, flush_secs=FLUSH_SECONDS, **options)
