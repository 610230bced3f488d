"""The training loop: the same for every model, data set and task.

`train` prepares a run (`training/run/run.py`), continues it from its newest checkpoint, and takes steps; between steps
it logs, evaluates and saves. The host reads results at log steps, before a save and in evaluations, never else.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import configs
import data
from configs import Config
from tasks.base import Task
from training.checkpoints import checkpoint
from training.distributed import hostread, mesh, processes
from training.distributed.preemption import Preempted, Signals
from training.run import began, branch, compiling, evaluate, feeding, goodput, provenance, summary
from training.run import workdir as workdirs
from training.run.eval_round import SAVED, EvalRound
from training.run.evaluations import Evaluations
from training.run.goodput import Window
from training.run.health import check as check_health
from training.run.lock import Lock
from training.run.log import Jsonl, Writers
from training.run.profile import Tracer
from training.run.run import Run, prepare
from training.run.state import TrainState
from training.run.step import finish_metrics
from training.run.terminal import Terminal

MOST_STEPS_UNDER_WAY = 2
NOTHING_TO_SAVE = "before the first step, with nothing to save; the same command continues"
DRY_RUN = {
    "train.steps": 2,
    "optim.warmup": "0",
    "optim.cooldown": "0",
    "log.every_steps": 1,
    "eval.every_steps": "0",
    "checkpoint.every_steps": "0",
    "log.tensorboard": False,
    "log.wandb": "",
}


def train(
    config: Config,
    workdir: str | os.PathLike[str],
    *,
    task: Task | None = None,
    sources: Mapping[str, data.Source] | None = None,
    terminal: Terminal | None = None,
    profile: bool = False,
    overrides: Mapping[str, Any] | None = None,
    most_eval_batches: int | None = None,
    resume_from: str = "",
    started: float | None = None,
    peak: Callable[[str], float | None] = lambda kind: None,
) -> dict[str, Any]:
    """Trains, or continues, the run of `config` in `workdir` and returns its summary.

    Args:
      workdir: made if absent; holds config.json, checkpoints, logs and, at the end, summary.json.
      task: in place of the one that `config.task.name` names.
      sources: in place of those that `config.data` names: `"train"`, and one for each evaluation set.
      terminal: where progress goes.
      profile: write a profiler trace of a few steps to `workdir/profile`.
      overrides: what was set on the command line, noted for those who continue the run.
      most_eval_batches: evaluate on the first batches only (dry runs).
      resume_from: `WORKDIR` or `WORKDIR@STEP` that a new run branches from (`training/run/branch.py`).
      started: when the command began, by `time.perf_counter`; now, if it is not given.
      peak: FLOP/s of a device by its kind, None for one that it does not know; for the log's `mfu`.

    Raises:
      ValueError, OSError: the run cannot work, or belongs to another configuration.
      FloatingPointError: a step was not finite and `config.train.nonfinite` is "stop", or too many in a row were not.
      Preempted: SIGTERM or SIGINT came; the state has been saved.
    """
    started = time.perf_counter() if started is None else started
    workdir, terminal = Path(workdir), terminal or Terminal(quiet=not processes.is_first())
    continuation = branch.Continuation(
        changes=workdirs.check(workdir, config),
        source=branch.find(workdir, resume_from),
        done=summary.completed(workdir),
    )
    own = workdirs.has_checkpoints(workdir)
    if continuation.source and not own:
        continuation.source.check(config)
    if (done := continuation.done) is not None and not continuation.longer:
        terminal.say(
            f"{workdir}: complete at step {done['step']}; see {workdir / 'summary.json'} (another workdir starts anew)"
        )
        return done
    if jax.distributed.is_initialized() and processes.connection() is None:
        raise ValueError(
            "several processes have to be connected by training.distributed.processes.start, as train.py does"
        )
    with Signals() as signals:
        with signals.at_once(NOTHING_TO_SAVE):
            first = began.read(workdir)
            source = (sources or {}).get("train")
            with terminal.busy("opening the data and tracing the model"):
                run = prepare(
                    config,
                    task=task,
                    source=source,
                    examples=first.examples if first else None,
                    begins=not (own or continuation.source),
                )
            for note in began.changes(first, run, f"--workdir={workdir}") if first else ():
                terminal.say(note)
            with terminal.busy("reading the newest checkpoint" if own else "making the initial parameters"):
                session = Session(
                    run, workdir, sources, terminal, overrides or {}, most_eval_batches, signals, continuation, started
                )
        with session:
            return session.run_steps(profile, peak)


class Session:
    """An open run: its state on the devices, its stream, checkpoints and logs."""

    def __init__(
        self,
        run: Run,
        workdir: Path,
        sources: Mapping[str, data.Source] | None,
        terminal: Terminal,
        overrides: Mapping[str, Any],
        most_eval_batches: int | None,
        signals: Signals,
        continuation: branch.Continuation,
        started: float,
    ):
        self.run, self.workdir, self.terminal = run, workdir, terminal
        self.signals, self.continuation = signals, continuation
        self.primary = processes.is_first()
        config = run.config
        self.log_every, self.save_every = (run.steps(group.every_steps) for group in (config.log, config.checkpoint))
        self.started = started
        evaluator = evaluate.Evaluator(
            run.task, run.graph, config, run.mesh, run.partner_graphs, run.partner_arrays, terminal=terminal
        )
        self.evaluations = Evaluations(config, evaluator, sources)
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"--workdir={workdir}: cannot be made: {error.strerror}") from error
        self.lock = Lock(workdir) if self.primary else None
        with contextlib.ExitStack() as undo:
            if self.lock:
                undo.callback(self.lock.close)  # what cannot be opened holds nothing
            self._open(overrides, most_eval_batches)
            undo.pop_all()

    def _open(self, overrides: Mapping[str, Any], most_eval_batches: int | None) -> None:
        """Finds the state to go on from, and opens what is written."""
        run, workdir, terminal, continuation = self.run, self.workdir, self.terminal, self.continuation
        config, signals, started = run.config, self.signals, self.started
        processes.check_shared(workdir, f"--workdir={workdir}")
        best, mode = run.task.best_metric
        self.checkpoints = checkpoint.Checkpointer(
            workdir / "checkpoints",
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
            best_metric=best,
            best_mode=mode,
        )
        compiled = compiling.spent
        self.state = self._restore_or_start()
        step, bad_steps = hostread.read((self.state.step, self.state.health["bad_steps"]))
        self.step, self.bad_steps = int(step), int(bad_steps)
        self.first_step = self.step
        continuation.check_length(run, workdir, self.step)
        run_id = None
        self.ledger = goodput.Ledger(workdir, self.step, started, self.primary)
        self.ledger.move(compiling.spent - compiled, "start", "compilation")
        self.utilization: goodput.Utilization | None = None
        if self.primary:
            # Only now: a workdir that cannot be continued stays as it is.
            run_id = continuation.begin(run, workdir, overrides, self.step, terminal)
            began.note(workdir, run)
        self.skipped_steps = 0  # as far as the host has read
        first = next(iter(self.evaluations.sources), "")
        self.writers = Writers(
            workdir,
            config.log,
            configs.as_dict(config),
            self.step,
            self.primary,
            run_id,
            values=configs.flat_values(config),
            metrics=["train/loss", *([f"eval/{first}/{best}"] if first else [])],
        )
        self.evaluation = EvalRound(
            run,
            self.evaluations,
            checkpoints=self.checkpoints,
            save=self._save,
            writers=self.writers,
            terminal=terminal,
            signals=signals,
            ledger=self.ledger,
            most_batches=most_eval_batches,
        )
        name = "examples.jsonl" if self.primary else f"examples-{jax.process_index()}.jsonl"
        self.example_ids = Jsonl(workdir / name, self.step) if config.log.example_ids else None
        if self.checkpoints.latest() is None and continuation.origin:
            self._save()  # so that the source is needed no more

    def _restore_or_start(self) -> TrainState:
        newest = self.checkpoints.latest()
        processes.agree(-1 if newest is None else newest, f"newest checkpoints in {self.workdir}")
        if newest is not None:
            restored, metadata = self.checkpoints.restore(
                self.run.template.as_dict(), shardings=self.run.shardings.as_dict()
            )
            self.run.task.check_same_data(metadata["info"], f"{self.workdir} step {metadata['step']}")
            self.terminal.say(f"resuming {self.workdir} from step {metadata['step']}")
            return self.continuation.resumed(self.run, TrainState(**restored), metadata)
        if source := self.continuation.source:
            return self.continuation.branched(self.run, source, self.terminal)
        return self.run.initial_state()

    def run_steps(self, profile: bool, peak: Callable[[str], float | None]) -> dict[str, Any]:
        """Takes the remaining steps and writes the summary."""
        run, total = self.run, self.run.total_steps
        if self.primary and self.first_step == 0 and not self.terminal.quiet:
            with self.terminal.busy("counting parameters and multiply-adds"):
                headline = provenance.headline(run)
            self.terminal.say(headline)
            for note in (*run.source.info.notes, *self.evaluations.notes):
                self.terminal.say(note)
        window = Window()
        under_way: collections.deque[jax.Array] = collections.deque()
        tracer = Tracer(self.workdir / "profile", self.first_step, total) if profile else None
        if self.first_step and self.evaluation.due(self.step) and not self.evaluation.was_held(self.step):
            self._evaluate(self.evaluation.due(self.step))  # the run was cut short between a save and this
        with contextlib.closing(
            feeding.train_stream(
                run.config, run.source, self.step * run.config.data.batch_size, mesh.batch_sharding(run.mesh)
            )
        ) as stream:
            batches, self.stats = self._on_device(stream, window, under_way), stream.stats
            if self.step < total:
                with self.signals.at_once(NOTHING_TO_SAVE):
                    with self.terminal.busy("reading the first batch"):
                        first = next(batches)
                    arguments = (self.state, first[0], run.partner_arrays)
                    with self.ledger.spending("compilation"):
                        traced = compiling.ahead(run.step, *arguments, what="the step", terminal=self.terminal)
                        self.utilization = goodput.Utilization(traced, peak)
                batches = itertools.chain([first], batches)
                self.ledger.enter(goodput.STEPS)
            while self.step < total:
                batch, ids = next(batches)
                with jax.transfer_guard("disallow"):
                    self.state, done = run.step(self.state, batch, run.partner_arrays)
                self.step += 1
                # Dispatch is asynchronous: without a bound, batches pile up on the devices and a signal is late.
                under_way.append(done)
                if len(under_way) > MOST_STEPS_UNDER_WAY:
                    under_way.popleft().block_until_ready()
                window.steps += 1
                if self.step == self.first_step + 1:
                    self._report_first_step()
                    window.restart(count=False)
                if self.example_ids:
                    self.example_ids.write({"step": self.step, "index": ids})
                if tracer:
                    tracer.after(self.step, self.state)
                self._between_steps(window, self.signals.after(self.step), {"replaced": stream.stats.replaced})
        return self._finish(window)

    def _on_device(
        self, stream: Iterator[Any], window: Window, under_way: Sequence[Any]
    ) -> Iterator[tuple[dict[str, jax.Array], list[int]]]:
        """Keeps one batch ahead on the devices, so that the transfer runs beside the step; counts time spent waiting
        for data. It is lost where the devices have nothing left to do when the batch is there.
        """
        sharding = mesh.batch_sharding(self.run.mesh)
        spec = self.run.task.batch_spec(self.run.config.data.batch_size, train=True)
        ahead: collections.deque = collections.deque()

        def fetch() -> None:
            begin = time.perf_counter()
            batch = next(stream)
            waited = time.perf_counter() - begin
            window.waited += waited
            if under_way and under_way[-1].is_ready():
                self.ledger.move(waited, goodput.STEPS, "data")
            present = feeding.fields(batch, spec, self.run.source, "train_transforms")
            ahead.append((mesh.put_batch(present, sharding), batch["index"].tolist()))

        fetch()
        for step in range(self.step, self.run.total_steps):
            current = ahead.popleft()
            if step + 1 < self.run.total_steps:
                fetch()
            yield current

    def _report_first_step(self) -> None:
        with self.terminal.busy("taking the first step"):
            jax.block_until_ready(self.state.step)
        self.terminal.say(f"first step after {time.perf_counter() - self.started:.1f} s (compilation included)")

    def _between_steps(self, window: Window, signal_number: int | None, stats: Mapping[str, Any]) -> None:
        """Logs, saves, evaluates and leaves, when it is time; in this order, as an evaluation may fail."""
        last = self.step == self.run.total_steps
        if last or (self.log_every and self.step % self.log_every == 0):
            self._log(window, stats)
        # Whoever is asked to leave has no time for an evaluation: the run that continues begins with it.
        evaluating = [] if signal_number else self.evaluation.due(self.step)
        if evaluating:
            jax.block_until_ready(self.state.step)
            window.restart()
        several = processes.connection() is not None
        saving = last or signal_number or (self.save_every and self.step % self.save_every == 0)
        if saving or (evaluating and several):
            with self.ledger.spending("saving"):
                self._save()
        if signal_number:
            with self.ledger.spending("saving"):
                self.checkpoints.wait()
            self.ledger.note(self.step)
            raise Preempted(f"signal {signal_number} at step {self.step}: {SAVED}", signal_number)
        if evaluating:
            if several:  # one whose evaluation failed could not end the save: that takes all of them
                self.checkpoints.wait()
            self._evaluate(evaluating)
            self.ledger.note(self.step)
            window.restart(count=False)

    def _log(self, window: Window, stats: Mapping[str, Any]) -> None:
        sums, health, taken = hostread.read((self.state.metrics, self.state.health, self.state.opt_state["count"]))
        self._check_health(health)
        seconds = time.perf_counter() - window.begin
        row = finish_metrics(self.run.task, sums)
        row["learning_rate"] = float(self.run.learning_rate(max(int(taken) - 1, 0)))
        row |= self._speed(window.steps, seconds)
        row["eta_seconds"] = (self.run.total_steps - self.step) * seconds / max(window.steps, 1)
        row["data_wait"] = window.waited / seconds
        row["skipped_steps"] = int(health["bad_steps"])
        skipped, self.bad_steps = int(health["bad_steps"]) - self.bad_steps, int(health["bad_steps"])
        self.ledger.move(skipped * seconds / max(window.steps, 1), goodput.STEPS, "skipped")
        self.ledger.note(self.step)
        row.update(self.ledger.shares())
        if self.utilization is not None:
            row.update(self.utilization.of(window.steps, seconds))
        row.update({f"data_{name}": int(value) for name, value in stats.items()})
        if self.primary:
            self.writers.write(self.step, "train", row)
            task = self.run.task
            self.terminal.progress(
                self.step,
                self.run.total_steps,
                row,
                shown=task.progress(),
                losses=tuple(task.losses()),
                unit=task.unit,
            )
        self.state = dataclasses.replace(self.state, metrics=self.run.fresh_metrics())
        window.restart()

    def _speed(self, steps: int, seconds: float) -> dict[str, float]:
        """`{"images_per_second": ...}`, or of whatever the task counts."""
        task = self.run.task
        count = steps * self.run.config.data.batch_size * task.units_per_example()
        return {f"{task.unit}_per_second": count / seconds}

    def _check_health(self, health: Mapping[str, Any]) -> None:
        self.skipped_steps, train = int(health["bad_steps"]), self.run.config.train
        check_health(
            health,
            self.run.group_names,
            step=self.step,
            total_steps=self.run.total_steps,
            skip=train.nonfinite == "skip",
            most_skipped=train.most_skipped,
            saved=self.checkpoints.latest(),
        )

    def _evaluate(self, labels: list[str]) -> None:
        self.evaluation.hold(labels, self.step, self.state)

    def _save(self) -> None:
        self._check_health(hostread.read(self.state.health))
        metadata = provenance.metadata(self.run, self.step) | {"branched_from": self.continuation.origin}
        self.ledger.note(self.step, saved=True)
        self.checkpoints.save(self.step, self.state.as_dict(), metadata)

    def _finish(self, window: Window) -> dict[str, Any]:
        with self.terminal.busy("saving the last checkpoint"):
            self.checkpoints.wait()
        held = self.evaluation
        if not held.results and not held.failures:  # a run that was stopped between its last save and here
            self._evaluate(held.due(self.step))
        seconds = max(window.all_seconds, 1e-9)
        totals = {
            "seconds": time.perf_counter() - self.started,
            "data_wait": window.all_waited / seconds,
            **self._speed(window.all_steps, seconds),
            "skipped_steps": self.skipped_steps,
        }
        params = hostread.read(self.state.params)
        if replaced := processes.total(self.stats.replaced) if self.run.config.data.on_error == "replace" else 0:
            totals["data_replaced"] = replaced  # since this process was started
            first = f", such as: {self.stats.messages[0]}" if self.stats.messages else ""
            self.terminal.say(f"{replaced} training examples were replaced (config.data.on_error=replace){first}")
        if self.utilization is not None:
            totals |= self.utilization.of(window.all_steps, window.all_seconds)
        result = summary.make(self.run, self.step, params, held.results, held.failures, totals)
        self.ledger.note(self.step)
        result["goodput"] = self.ledger.result()
        if self.primary:
            summary.write(self.workdir, result)
            skipped = f" ({self.skipped_steps} steps skipped as not finite)" if self.skipped_steps else ""
            self.terminal.say(str(self.ledger))
            self.terminal.say(f"done: {self.workdir / 'summary.json'}{skipped}")
        return result

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.evaluations.close()
        self.writers.close()
        if self.example_ids:
            self.example_ids.close()
        # An error on its way out says more than what follows from it.
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self.checkpoints.close()
        if self.lock:
            self.lock.close()
