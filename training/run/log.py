"""What a run writes while it works: metrics.jsonl, TensorBoard, and Weights & Biases if asked for."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks import logged
from training.run import rows
from training.run.rows import Jsonl
from training.run.tensorboard import Pictures, Tables, TensorBoard, scalars

__all__ = ["Jsonl", "Writers"]


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
