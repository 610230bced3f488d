"""Predictions for every image below a folder, as a table in a CSV file."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import data
from data.names import printable
from training.distributed import processes
from training.evaluation.trained import Trained
from training.run import feeding


def predict_folder(trained: Trained, folder: str | Path) -> str:
    """The text of a CSV file with one line per image, in the order of their paths.

    Columns: `file` (below the folder), `class` and `probability` (of the best class), then `top2, probability2` and
    so on to the fifth best. With `data.on_error=replace` the last column `left_out` says why an image has no
    prediction; how many have none is said on stderr.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: it has no images, one of them cannot be read, or the task does not predict classes.
    """
    source = data.open_source(f"images:{folder}", split="all", cache="none", reading=feeding.reading(trained.config))
    info = trained.task.info
    names = list(info.class_names) or [str(number) for number in range(info.num_classes or 0)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    replacing = trained.config.data.on_error == "replace"
    cells: list[str] = []  # of a line without a prediction
    done = predicted = 0

    def leave_out(end: int) -> None:
        """Lines for the images up to `end` that gave no prediction."""
        for index in range(done, end):
            why = trained.evaluator.reasons.get(index, "cannot be used")
            writer.writerow([_below(folder, source.describe(index)), *cells, why])

    for number, batch in enumerate(trained.evaluator.predict(trained.params, trained.model_state, source)):
        if "classes" not in batch:
            raise ValueError(f"--predict: task {trained.config.task.name} predicts {', '.join(batch)}, not classes")
        if number == 0:
            header = _header(batch["classes"].shape[1])
            cells = [""] * (len(header) - 1)
            writer.writerow([*header, "left_out"] if replacing else header)
        for index, classes, probabilities in zip(batch["index"], batch["classes"], batch["probabilities"], strict=True):
            leave_out(int(index))
            pairs = [(names[label], f"{value:.6f}") for label, value in zip(classes, probabilities, strict=True)]
            line = [_below(folder, source.describe(int(index))), *(cell for pair in pairs for cell in pair)]
            writer.writerow([*line, ""] if replacing else line)
            done = int(index) + 1
            predicted += 1
    leave_out(len(source))
    if predicted < len(source) and processes.is_first():
        print(
            f"{len(source) - predicted} of {len(source)} images left out (config.data.on_error=replace)",
            file=sys.stderr,
        )
    return text.getvalue()


def _header(columns: int) -> Sequence[str]:
    others = [name for rank in range(2, columns + 1) for name in (f"top{rank}", f"probability{rank}")]
    return ["file", "class", "probability", *others]


def _below(folder: str | Path, file: str) -> str:
    root = Path(printable(str(Path(folder).expanduser())))
    return Path(file).relative_to(root).as_posix() if Path(file).is_relative_to(root) else file
