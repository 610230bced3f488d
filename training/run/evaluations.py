"""All evaluation sets of a run or of a checkpoint, and what evaluates each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np

import data
from configs import Config, Duration
from training.run import sets
from training.run.evaluate import Evaluator, Results
from training.run.state import Flat

Samples = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Opened:
    source: data.Source
    fit: data.Source | None
    evaluator: Evaluator
    every: Duration | None


class Evaluations:
    """The sets of a configuration, open, in the terms of the model (`Task.matched`) and checked.

    Attributes:
      sources: by label; the first is the one that checkpoints are chosen on.
      notes: what to know of them, in sentences.
      samples: of every set that was evaluated, what the task shows in its report (`Task.samples`).
    """

    def __init__(self, config: Config, evaluator: Evaluator, sources: Mapping[str, data.Source] | None = None):
        """Opens the sets of `config`.

        Args:
          evaluator: for sets that change nothing; those that do get one of their own from it.
          sources: in place of those that the configuration names; all but `"train"` are evaluation sets.

        Raises:
          ValueError, OSError: a set cannot be opened, or not be evaluated.
        """
        task = evaluator.task
        if sources is not None:
            known = {
                label: sets.EvalSet(label, (source.info.name, source.info.split), config)
                for label, source in sources.items()
                if label != "train"
            }
        else:
            known = sets.described(config)
        opened = {label: (sources or {}).get(label) or one.open() for label, one in known.items()}
        said = {label: task.mismatch(source) for label, source in opened.items()}
        self.notes = [
            *sets.notes(config, opened),
            *(f"{label} ({opened[label].info.name}): {note}" for label, note in said.items() if note),
        ]
        self.samples: dict[str, Samples] = {}
        self._sets: dict[str, _Opened] = {}
        for label, one in known.items():
            source, fit = task.matched(opened[label]), one.open_fit()
            own = evaluator if one.config is config else evaluator.changed(one.config)
            if fit is not None:
                fit = task.matched(fit)
            own.check(source, fit)
            self._sets[label] = _Opened(source, fit, own, one.every)
        self.sources = {label: one.source for label, one in self._sets.items()}
        for own in self._evaluators():
            theirs = [one for one in self._sets.values() if one.evaluator is own]
            own.serving(source for one in theirs for source in (one.fit, one.source) if source is not None)

    def _evaluators(self) -> Iterable[Evaluator]:
        return {id(one.evaluator): one.evaluator for one in self._sets.values()}.values()

    def due(self, step: int, total: int, period: int, steps: Callable[[Duration], int]) -> list[str]:
        """The sets to evaluate after a step: all after the last, and others at their periods, but not one step before
        the last.

        Args:
          period: of sets without one of their own, in steps; 0 for the last only.
          steps: a duration of the run in steps.
        """
        if step == total:
            return list(self._sets)

        def at(every: int) -> bool:
            return bool(every) and step % every == 0 and (every == 1 or step != total - 1)

        return [label for label, one in self._sets.items() if at(period if one.every is None else steps(one.every))]

    def evaluate(self, label: str, params: Flat, model_state: Flat, *, most_batches: int | None = None) -> Results:
        """The results on one set (`Evaluator.__call__`)."""
        one = self._sets[label]
        with one.evaluator.terminal.busy(f"evaluating {label}"):
            results = one.evaluator(params, model_state, one.source, fit=one.fit, most_batches=most_batches)
        self.samples[label] = one.evaluator.samples
        return results

    def close(self) -> None:
        """Ends the data workers; the next evaluation starts new ones."""
        for own in self._evaluators():
            own.close()
