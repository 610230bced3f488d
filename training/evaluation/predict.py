"""Predictions for every file below a folder, or every example of a set: a table, lines of JSON, pictures."""

from __future__ import annotations

import csv
import io
import itertools
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import data
from data.names import printable
from tasks.base import Picture
from training.checkpoints import json_text
from training.distributed import preemption, processes
from training.evaluation import results
from training.evaluation.trained import Trained
from training.run import feeding

PICTURES = "predictions"


def predict(trained: Trained, place: str | Path, output: Path) -> list[Path]:
    """Writes what the task says of every example, in their order, and returns the files; one process writes.

    `predictions.csv` has a line for each: `file` (below the folder) and what `Task.written` gives, text and numbers.
    Where that is more than text and numbers it is `predictions.jsonl`, an object a line. Pictures go to the folder
    `predictions` as PNG files, named in the line. With `data.on_error=replace` the last column `left_out` says why an
    example has no prediction; how many have none is said on stderr.

    Args:
      place: a folder of files, or `source@split`.
      output: the folder to write to.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: it has no examples, or one of them cannot be read.
    """
    source = _open(trained, place)
    replacing = trained.config.data.on_error == "replace"
    pictures = _Pictures(output)
    lines: dict[int, dict[str, Any]] = {}
    for batch in trained.evaluator.predict(trained.params, trained.model_state, source):
        for number, index in enumerate(batch["index"].tolist()):
            made = trained.task.written({name: value[number] for name, value in batch.items() if name != "index"})
            file = _below(place, source.describe(index))
            lines[index] = {"file": file, **pictures.kept(file, made)}
    columns = list(dict.fromkeys(name for line in lines.values() for name in line))
    if missing := len(source) - len(lines):
        reasons = trained.evaluator.reasons
        for index in range(len(source)):
            if index not in lines:
                why = reasons.get(index, "cannot be used")
                lines[index] = {"file": _below(place, source.describe(index)), "left_out": why}
        if processes.is_first():
            print(f"{missing} of {len(source)} examples left out (config.data.on_error=replace)", file=sys.stderr)
    rows = [lines[index] for index in sorted(lines)]
    if not processes.is_first():
        return []
    with preemption.finishing():
        return [_table(output, rows, [*columns, "left_out"] if replacing else columns), *pictures.finish()]


def _open(trained: Trained, place: str | Path) -> data.Source:
    name, at, split = str(place).rpartition("@")
    if at and not Path(place).expanduser().exists():
        return feeding.open_source(trained.config, name or trained.config.data.name, split)
    return data.open_files(place, data.Reading.of(trained.config.data))


def _table(output: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Path:
    plain = all(isinstance(value, str | int | float) for row in rows for value in row.values())
    if not plain:
        lines = "".join(json_text.text(dict(row)) + "\n" for row in rows)
        return results.write_text(output / "predictions.jsonl", lines)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return results.write_text(output / "predictions.csv", text.getvalue())


class _Pictures:
    """PNG files, which take the place of those of an earlier command when all of them are there."""

    def __init__(self, output: Path):
        self._folder, self._part = output / PICTURES, output / f"{PICTURES}.part"
        self._files: set[str] = set()

    def kept(self, file: str, made: Mapping[str, Any]) -> dict[str, Any]:
        """The line of an example, its pictures written and replaced by their names."""
        return {name: self._write(file, name, v) if isinstance(v, Picture) else v for name, v in made.items()}

    def _write(self, file: str, name: str, picture: Picture) -> str:
        stem = re.sub(r"[^\w.-]+", "_", str(Path(file).with_suffix("")))
        path = f"{stem}_{name}.png"
        for number in itertools.count(2):  # a/b.png and a_b.png, 1.png and 1.jpg have the same stem
            if path not in self._files:
                break
            path = f"{stem}_{name}_{number}.png"
        if processes.is_first():
            if not self._files:
                shutil.rmtree(self._part, ignore_errors=True)
                self._part.mkdir(parents=True)
            picture.save(self._part / path)
        self._files.add(path)
        return f"{PICTURES}/{path}"

    def finish(self) -> list[Path]:
        """Puts the files in their place, and returns the folder, if there are any."""
        if not self._files:
            return []
        shutil.rmtree(self._folder, ignore_errors=True)
        self._part.rename(self._folder)
        return [self._folder]


def _below(folder: str | Path, file: str) -> str:
    root = Path(printable(str(Path(folder).expanduser())))
    return Path(file).relative_to(root).as_posix() if Path(file).is_relative_to(root) else file
