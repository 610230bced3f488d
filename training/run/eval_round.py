"""An evaluation between two steps: which sets are due, what is logged, and what happens to the state when one fails or
a signal comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import errors
from training.checkpoints.checkpoint import Checkpointer
from training.distributed import processes
from training.distributed.preemption import Preempted, Signals
from training.run import compiling, evaluate
from training.run.evaluations import Evaluations
from training.run.goodput import Ledger
from training.run.log import Writers
from training.run.run import Run
from training.run.state import TrainState
from training.run.terminal import Terminal

SAVED = "state saved; the same command continues"


class EvalRound:
    """Evaluates the sets of a run.

    Attributes:
      results: of every set that was evaluated in the last round, by label.
      failures: why others have none.
    """

    def __init__(
        self,
        run: Run,
        evaluations: Evaluations,
        *,
        checkpoints: Checkpointer,
        save: Callable[[], None],
        writers: Writers,
        terminal: Terminal,
        signals: Signals,
        ledger: Ledger,
        most_batches: int | None,
    ):
        """Takes what a session is made of.

        Args:
          save: saves the state of this step, if it is not saved yet.
          most_batches: evaluate on the first batches only (dry runs).
        """
        self.run, self.evaluations, self.checkpoints, self.save = run, evaluations, checkpoints, save
        self.writers, self.terminal, self.signals, self.ledger = writers, terminal, signals, ledger
        self.most_batches = most_batches
        self.period = run.steps(run.config.eval.every_steps)
        self.on_error = run.config.eval.on_error
        self.results: dict[str, Any] = {}
        self.failures: dict[str, str] = {}

    def due(self, step: int) -> list[str]:
        """The sets to evaluate after a step."""
        return self.evaluations.due(step, self.run.total_steps, self.period, self.run.steps)

    def was_held(self, step: int) -> bool:
        """Whether the log has the evaluation of this step, or no further one is to come anyway."""
        rows = self.writers.rows(step) if processes.is_first() else []
        noted = any(str(row.get("kind", "")).startswith("eval/") for row in rows)
        return step == self.run.total_steps or processes.first_says(noted)

    def hold(self, labels: Iterable[str], step: int, state: TrainState) -> None:
        """Evaluates these sets, and notes with the checkpoint of this step, if there is one, how good it is on the
        first set of all.

        Raises:
          Preempted: a signal came; what was evaluated is dropped, the state is saved.
          the error of a set that cannot be evaluated, where the run is to stop; the state is saved.
        """
        compiled = compiling.spent
        with self.ledger.spending("evaluation"):
            self._evaluate(labels, step, state)
            if processes.is_first():
                for label, results in self.results.items():
                    self._say(label, results, step)
        self.ledger.move(compiling.spent - compiled, "evaluation", "compilation")
        metric = self.results.get(next(iter(self.evaluations.sources), ""), {}).get(self.run.task.best_metric[0])
        if metric is not None:
            self.checkpoints.attach(step, metric)

    def _evaluate(self, labels: Iterable[str], step: int, state: TrainState) -> None:
        self.results, self.failures = {}, {}
        use_ema = bool(self.run.config.optim.ema) and self.run.config.eval.use_ema
        chosen = state.ema if use_ema else {"params": state.params, "model_state": state.model_state}
        for label in labels:
            try:
                with self.signals.at_once("in an evaluation"):
                    self.results[label] = self.evaluations.evaluate(
                        label, chosen["params"], chosen["model_state"], most_batches=self.most_batches
                    )
            except Preempted as stop:
                raise self._leave(stop, step) from None
            except Exception as error:
                self.failures[label] = self._failed(label, error, step)

    def _say(self, label: str, results: Mapping[str, Any], step: int) -> None:
        if not self.writers.had(step, f"eval/{label}"):  # by a run that was killed before it wrote its summary
            self.writers.write(step, f"eval/{label}", evaluate.scalars(results))
            if self.writers.shows:
                task, source = self.run.task, self.evaluations.sources[label]
                self.writers.show(step, f"eval/{label}", task.tables(results), task.pictures(results, source))
        said = [_described(results, self.run.task.columns)]
        if note := evaluate.left_out(results, self.evaluations.sources[label]):
            said.append(note)
        for text in said:
            self.terminal.say(f"step {step} eval {label}: {text}")

    def _leave(self, stop: Preempted, step: int) -> Preempted:
        """Saves the state, if it is not saved, and says so; what was evaluated is dropped."""
        self.terminal.clear()
        if processes.connection() is None:  # several have saved it
            self.save()
        self.checkpoints.wait()
        text = f"signal {stop.number} in the evaluation of step {step}, which is dropped: {SAVED}"
        return Preempted(text, stop.number, together=False)

    def _failed(self, label: str, error: Exception, step: int) -> str:
        """Says why a set cannot be evaluated, and returns it, where the run goes on."""
        alone = processes.connection() is None
        if alone:
            self.save()
            self.checkpoints.wait()
        if not isinstance(error, ValueError | OSError):  # a fault of this code
            raise error
        text = f"evaluation of {label} at step {step}: {' '.join(str(error).split())}"
        if not alone or self.on_error == "stop":
            choice = " (eval.on_error=continue goes on without it)" if alone else ""
            of_machine = errors.judge(error)[0] == errors.MACHINE  # the code to leave with is that of the cause
            kind = errors.MachineFault if of_machine else errors.BadInput
            raise kind(f"{text}; the state of this step is saved, and the same command continues{choice}") from error
        self.terminal.say(f"{text}; the run goes on (eval.on_error=continue)")
        return text


def _described(results: Mapping[str, Any], columns: Iterable[str]) -> str:
    """The first numbers of an evaluation, in the order of `columns` where these name some."""
    found = evaluate.scalars(results)
    shown = [name for name in columns if name in found] or list(found)
    return "  ".join(f"{name} {found[name]:.4f}" for name in shown[:3])
