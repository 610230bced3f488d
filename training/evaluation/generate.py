"""Samples of a generative task for the first examples of a set, as one file of arrays."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

import data
from training.distributed import preemption, processes
from training.evaluation.trained import Trained


def generate(trained: Trained, source: data.Source, count: int, path: Path) -> Path:
    """Writes `path`, an .npz file with `count` samples: every array of `Task.generate` and the examples' `index`.

    After the last example of the set its first one gives another sample. One process writes.

    Raises:
      ValueError: the task does not generate.
    """
    batches, made = [], 0
    for batch in trained.evaluator.generate(trained.params, trained.model_state, source, trained.config.seed):
        batches.append(batch)
        made += len(batch["index"])
        if made >= count:
            break
    arrays = {name: np.concatenate([batch[name] for batch in batches])[:count] for name in batches[0]}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    if processes.is_first():
        path.parent.mkdir(parents=True, exist_ok=True)
        with preemption.finishing():
            path.write_bytes(buffer.getvalue())
    return path
