"""The best of some checkpoints, by the metric that was measured when they were saved."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from typing import Literal

import configs
import tasks
from training.checkpoints import checkpoint_files as files
from training.checkpoints import reading
from training.checkpoints.checkpoint_files import UnreadableCheckpoint
from training.distributed import processes


def ranked(scores: Mapping[int, float], mode: Literal["max", "min"]) -> list[int]:
    """Steps by how good they are, best first; of equally good ones the later first. What is no number is left out.

    Args:
      scores: metric by step.
      mode: whether the highest is the best ("max") or the lowest ("min").
    """
    sign = 1 if mode == "max" else -1
    known = {step: sign * score for step, score in scores.items() if not math.isnan(score)}
    return sorted(known, key=lambda step: (known[step], step), reverse=True)


def step(path: str | os.PathLike[str]) -> int:
    """The step of the best checkpoint of a workdir, which is said on stderr. One that is damaged is no candidate.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: none was measured; the line says which steps there are.
      InaccessibleCheckpoint: one may be the best and cannot be read here and now.
    """
    scores, name = dict[int, float](), ""
    mode: Literal["max", "min"] = "max"
    found = reading.candidates(path, None)
    for place in found:
        try:
            about = files.read_about(place)
        except UnreadableCheckpoint as error:
            print(f"{place}: {error}; it is no candidate for the best", file=sys.stderr)
            continue
        if not name:
            name, mode = tasks.find(
                configs.from_dict(reading.metadata_of(about).get("config", {})).task.name
            ).best_metric
        metric = about["metric"]
        if metric is not None and metric["name"] == name:
            scores[about["step"]] = metric["value"]
    order = ranked(scores, mode)
    if not order:
        steps = ", ".join(place.name for place in reversed(found))
        raise ValueError(f"--best: no checkpoint of {path} was measured; --step=N takes one of {steps}")
    unknown = f"; {len(found) - len(scores)} were not measured" if len(found) > len(scores) else ""
    if processes.is_first():
        score = f"{scores[order[0]]:.6g}"
        print(f"best of {len(found)} checkpoints by {name}: step {order[0]} ({score}){unknown}", file=sys.stderr)
    return order[0]
