"""A run that branches from another one: the whole state of a checkpoint, in a new workdir, under another configuration.

Parameters, optimizer, averages, step and position in the data are taken as they are. What a state cannot be carried
over is refused; the learning rate is that of the new configuration at the step that the source had come to.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import configs
from configs import Config
from training.checkpoints import reading
from training.distributed import hostread
from training.run import workdir as workdirs
from training.run.health import healthy
from training.run.run import Run
from training.run.state import TrainState
from training.run.terminal import Terminal

FLAG = workdirs.RESUME_FROM
# Of some keys any change, of others one between off and on; why the state is no use then.
REFUSED = {
    "model.name": "its parameters are those of another model",
    "model.attention": "its parameters are those of another model",
    "model.init_from": "the whole state is taken, and nothing from there",
    "task.name": "its parameters were trained for another task",
    "data.batch_size": "its position in the data is counted in batches",
    "optim.name": "its state is that of another optimizer",
    "optim.mu_dtype": "its moments are stored in another type",
}
SHAPING = ("model", "task", "optim", "data", "train")  # groups of keys that may decide what a state looks like
REFUSED_SWITCH = {
    "optim.ema": "one of the two has no moving averages",
    "optim.momentum": "one of the two has no momentum",
}


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a run branches from: a workdir, or a checkpoint in one, and of which step (None is the newest)."""

    path: str
    step: int | None

    def __str__(self) -> str:
        return self.path if self.step is None else f"{self.path}@{self.step}"

    def check(self, config: Config) -> None:
        """Refuses one that is not there, or whose state cannot go on under a configuration, before anything is done.

        Raises:
          FileNotFoundError: it is not there; the line says what is.
          ValueError: names the key and the reason.
        """
        try:
            candidates = reading.candidates(self.path, self.step)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{FLAG}={self}: {error}") from error
        check(config, self, reading.describe(candidates))


@dataclasses.dataclass
class Continuation:
    """How a run goes on in its workdir, or from another one, and what is said and noted of it.

    Attributes:
      changes: of the configuration since it last began, `key: before -> now`.
      source: where it branches from, or did.
      done: the summary of the run if it was complete.
      origin: what is noted in checkpoints of where it branched from.
      rate: the learning rate of the next step as it was before.
    """

    changes: list[str]
    source: Source | None
    done: dict[str, Any] | None
    origin: dict[str, Any] | None = None
    rate: float | None = None

    @property
    def longer(self) -> bool:
        """Whether another length is asked for."""
        return any(workdirs.key_of(change) == "train.steps" for change in self.changes)

    def resumed(self, run: Run, state: TrainState, metadata: Mapping[str, Any]) -> TrainState:
        """The state of an own checkpoint, as this configuration goes on with it."""
        self.origin, self.rate = metadata.get("branched_from"), metadata.get("learning_rate")
        return _trusted(run, state)

    def branched(self, run: Run, source: Source, terminal: Terminal) -> TrainState:
        """The state of the source, and a line about it."""
        state, self.origin, differs = take(run, source)
        self.rate = self.origin["learning_rate"]
        text = f": {workdirs.shown(differs)}" if differs else ", with the same configuration"
        terminal.say(f"branching from {source.path} at step {self.origin['step']}{text}")
        self._say_rate(run, self.origin["step"], terminal)
        return _trusted(run, state)

    def check_length(self, run: Run, workdir: Path, step: int) -> None:
        """Refuses a length that the run has passed."""
        if step > run.total_steps:
            raise ValueError(
                f"config.train.steps={run.config.train.steps}: --workdir={workdir} is at step {step} already, and this "
                f"is {run.total_steps} steps; another workdir may branch from an earlier checkpoint by "
                f"{FLAG}={workdir}@STEP"
            )

    def begin(self, run: Run, workdir: Path, overrides: Mapping[str, Any], step: int, terminal: Terminal) -> str:
        """Notes what the workdir holds from now on, says what is new, and returns the id of the run."""
        run_id = workdirs.begin(workdir, run.config, overrides, step=step, changes=self.changes, origin=self.origin)
        if self.changes:
            terminal.say(f"changed from step {step} on: {workdirs.shown(self.changes)}")
        if self.longer:
            self._say_rate(run, step, terminal)
            if self.done is not None and step < run.total_steps:
                workdirs.retire_summary(workdir, self.done)
        return run_id

    def _say_rate(self, run: Run, step: int, terminal: Terminal) -> None:
        now, optim = float(run.learning_rate(step)), run.config.optim
        before = "" if self.rate is None else f", and was {self.rate:.3g} before"
        terminal.say(
            f"learning rate at step {step}: {now:.3g}{before} ({optim.schedule} over {run.total_steps} steps, warmup "
            f"{optim.warmup}, cooldown {optim.cooldown})"
        )


def _trusted(run: Run, state: TrainState) -> TrainState:
    """Without the record of steps left out, where such a step stops a run: under another policy it went on."""
    if run.config.train.nonfinite != "stop" or not hostread.read(state.health["bad_steps"]):
        return state
    fresh = jax.jit(lambda: healthy(len(run.group_names)), out_shardings=run.shardings.health)()
    return dataclasses.replace(state, health=fresh)


def parse(text: str) -> Source:
    """Reads `WORKDIR` or `WORKDIR@STEP`."""
    return Source(*workdirs.split_step(text))


def find(workdir: Path, text: str) -> Source | None:
    """Where the run of a workdir branches from, by its record or by the flag; None if it does not.

    Raises:
      ValueError: it began otherwise.
    """
    noted = workdirs.record(workdir)
    origin = noted.get("branched_from")
    begun = (workdir / "config.json").exists()
    if text:
        asked = parse(text)
        if asked.path in (os.path.abspath(workdir), os.path.abspath(workdir / "checkpoints")):
            raise ValueError(f"{FLAG}={text}: is the workdir itself; leave the flag out, or use another --workdir")
        same = origin and origin["workdir"] == asked.path and asked.step in (None, origin["step"])
        if begun and not same:
            began = f"branched from {origin['workdir']}@{origin['step']}" if origin else "began anew"
            raise ValueError(f"{FLAG}={text}: the run in --workdir={workdir} {began}; use another workdir")
        if not begun:
            return asked
    return Source(origin["workdir"], origin["step"]) if origin else None


def take(run: Run, source: Source) -> tuple[TrainState, dict[str, Any], list[str]]:
    """The state that a run branches from, what is noted of it, and what differs, `key: before -> now`.

    All processes call this.

    Raises:
      FileNotFoundError, OSError: no such checkpoint, or it cannot be read.
      ValueError: the state cannot go on under this configuration; the message names the key.
    """
    candidates = reading.candidates(source.path, source.step)
    template, shardings = run.template.as_dict(), run.shardings.as_dict()
    # Sums since the last log line begin anew: what is summed may differ.
    parts = [name for name in template if name != "metrics"]
    changes = workdirs.differences(reading.describe(candidates)["config"], run.config)
    try:
        path, state, metadata = reading.read_state(
            candidates, {name: template[name] for name in parts}, {name: shardings[name] for name in parts}, parts
        )
    except ValueError as error:
        keys = [key for key in map(workdirs.key_of, changes) if key.split(".")[0] in SHAPING]
        raise ValueError(
            f"{FLAG}={source}: {error} (what differs: {', '.join(keys) or 'the code'}); {_instead(source)}"
        ) from error
    changes = workdirs.differences(metadata["config"], run.config)
    run.task.check_same_data(metadata["info"], f"{FLAG}={source}")
    if metadata["step"] >= run.total_steps:
        raise ValueError(
            f"config.train.steps={run.config.train.steps}: {FLAG}={source} is at step {metadata['step']} already, and "
            f"this is {run.total_steps} steps; give more"
        )
    state["metrics"] = run.fresh_metrics()
    if metadata["config"]["seed"] != run.config.seed:
        seed = run.config.seed
        state["key"] = jax.jit(lambda: jax.random.key(seed), out_shardings=run.shardings.key)()
    noted = {
        "workdir": source.path,
        "step": metadata["step"],
        "checkpoint": str(path),
        "config_hash": metadata.get("config_hash"),
        "commit": metadata.get("commit"),
        "learning_rate": metadata.get("learning_rate"),
    }
    return TrainState(**state), noted, changes


def check(config: Config, source: Source, metadata: Mapping[str, Any]) -> None:
    """Refuses keys with whose values a state cannot go on.

    Args:
      metadata: of the checkpoint.
    """
    before = configs.flat_values(configs.from_dict(metadata["config"]))
    now = configs.flat_values(config)
    for key, reason in {**REFUSED, **REFUSED_SWITCH}.items():
        if key in REFUSED_SWITCH and (before[key] == 0) == (now[key] == 0):
            continue
        if before[key] != now[key]:
            raise ValueError(
                f"config.{key}={now[key]}: {FLAG}={source} has {before[key]!r}, and {reason}; {_instead(source)}"
            )


def _instead(source: Source) -> str:
    return f"the parameters alone are taken by --config.model.init_from={source.path}"
