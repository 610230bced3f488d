"""`train.py --sweep KEY=A,B`: one run for each combination of values, one after another, each in its own folder.

Every run is a `train.py` in a process of its own, so that its memory is freed and its failure does not end the others.
`WORKDIR/sweep.json` holds what was asked for, so that the same command continues where it stopped, and more values can
be added later. `training/evaluation/sweep_table.py` shows what came out.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import dataclasses
import hashlib
import itertools
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import configs
import errors
import naming
from configs import Config
from training.checkpoints import json_text
from training.checkpoints.whole import set_aside
from training.distributed import preemption
from training.run import workdir as workdirs
from training.run.lock import Lock

FILE = "sweep.json"
MOST_OF_A_VALUE = 40  # characters of it in the name of a folder
_OPEN, _CLOSE = "([{", ")]}"
TICK_SECONDS = 0.2
Start = Callable[[Sequence[str], Callable[[], int | None]], tuple[int, str]]
"""Runs `train.py` with arguments; see `in_a_process`."""


@dataclasses.dataclass(frozen=True)
class Combination:
    """One run of a sweep: the name of its folder, and its values by key as they were typed."""

    name: str
    values: Mapping[str, str]


def parse(texts: Iterable[str]) -> dict[str, list[str]]:
    """Reads `optim.learning_rate=1e-4,3e-4`, one text for each key; a value with commas stands in brackets.

    Raises:
      ValueError: no value, one that is there twice, a key that is there twice, brackets that do not match.
    """
    found: dict[str, list[str]] = {}
    for text in texts:
        key, given, rest = text.partition("=")
        key = key.removeprefix("--").removeprefix("config.")
        if not given or not key:
            raise ValueError(f"--sweep {text}: takes KEY=A,B, such as optim.learning_rate=1e-4,3e-4")
        if key in found:
            raise ValueError(f"--sweep {text}: {key} is swept twice; give all of its values at once")
        values = [_value(part.strip(), text) for part in _split(rest, text)]
        if repeated := next((value for value in values if values.count(value) > 1), None):
            raise ValueError(f"--sweep {text}: {repeated} is there twice")
        found[key] = values
    return found


def combinations(swept: Mapping[str, Sequence[str]]) -> list[Combination]:
    """All combinations, the values of the last key changing first."""
    last = collections.Counter(key.rpartition(".")[2] for key in swept)
    short = {key: key if last[name := key.rpartition(".")[2]] > 1 else name for key in swept}
    found = []
    for values in itertools.product(*swept.values()):
        chosen = dict(zip(swept, values, strict=True))
        found.append(Combination(",".join(f"{short[k]}={_in_a_name(v)}" for k, v in chosen.items()), chosen))
    return found


@dataclasses.dataclass
class Sweep:
    """A sweep in its folder.

    Attributes:
      config: the configuration file, `file.py:argument`.
      overrides: what is set for all runs, by key.
      runs: those of this command; the file also has those of earlier ones.
      flags: further ones for every run, such as `--resume_from=...`.
    """

    folder: Path
    config: str
    overrides: Mapping[str, Any]
    runs: list[Combination]
    flags: list[str] = dataclasses.field(default_factory=list)

    def check(self, resume_from: str = "") -> None:
        """Refuses what cannot work in any of the runs, before the first one begins; changes nothing.

        Raises:
          ValueError: a key or a value is wrong, or two combinations are the same run; a folder holds something else.
        """
        import models  # after start_jax, which sets what JAX reads once
        import tasks

        if (self.folder / "config.json").exists():
            raise ValueError(f"--workdir={self.folder}: holds a run; a sweep needs a folder of its own")
        same: dict[str, Combination] = {}
        for run in self.runs:
            if swept := next((key for key in run.values if key in self.overrides), None):
                raise ValueError(
                    f"--config.{swept}={self.overrides[swept]}: --sweep sets {swept} too; give one of them"
                )
            config = self._config_of(run, resume_from)
            known = tasks.find(config.task.name).known_options
            configs.build(known, config.task.options, "task.options.")
            models.options_of_model(config.model.name)
            workdirs.check(self.folder / run.name, config)
            other = same.setdefault(configs.digest(config), run)
            if other is not run:
                raise ValueError(f"--sweep: {other.name} and {run.name} are the same run")

    def _config_of(self, run: Combination, resume_from: str = "") -> Config:
        where = self.folder / run.name
        inherited = workdirs.inherited(resume_from, where) if resume_from else {}
        return configs.load(self.config, {**inherited, **workdirs.overrides(where), **self.overrides, **run.values})

    def note(self) -> None:
        """Writes what was asked for, beside what earlier commands did."""
        before = read(self.folder) if (self.folder / FILE).is_file() else {}
        runs = {**before.get("runs", {}), **{run.name: dict(run.values) for run in self.runs}}
        path = self.folder / FILE
        if path.is_dir():
            set_aside(path)
        json_text.write(path, {"config": self.config, "overrides": dict(self.overrides), "runs": runs})

    def run(self, start: Start | None = None) -> dict[str, tuple[int, str]]:
        """Runs what is not complete.

        Args:
          start: in place of `in_a_process`.

        Returns:
          Exit code and error of every run that failed, by name.

        Raises:
          preemption.Preempted: the sweep was asked to stop, and so was the run that was under way.
        """
        from training.run import summary  # after start_jax

        failed = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(self.folder)
        self.note()
        with preemption.Signals() as signals:
            for place, run in enumerate(self.runs, start=1):
                where = self.folder / run.name
                done = summary.completed(where) and not workdirs.check(where, self._config_of(run))
                print(f"sweep {place}/{len(self.runs)}: {run.name}{': complete' if done else ''}", flush=True)
                if not done:
                    code, error = (start or in_a_process)(self._arguments(run), lambda: signals.after(0))
                    asked = signals.after(0) or {errors.AGAIN: signal.SIGTERM, errors.INTERRUPTED: signal.SIGINT}.get(
                        code
                    )
                    if asked:
                        raise preemption.Preempted(f"sweep stopped in {run.name}; the same command continues it", asked)
                    if code:
                        failed[run.name] = (code, error)
        lock.close()
        return failed

    def _arguments(self, run: Combination) -> list[str]:
        values = {**self.overrides, **run.values}
        flags = [f"--config={self.config}", f"--workdir={self.folder / run.name}", *self.flags]
        return [*flags, *(f"--config.{key}={value}" for key, value in values.items())]


def read(folder: Path) -> dict[str, Any]:
    """What `sweep.json` of a folder says.

    Raises:
      ValueError, FileNotFoundError: it cannot be read, or is not there.
    """
    path = folder / FILE
    if not path.is_file():
        beside = [place.parent.name for place in folder.absolute().parent.glob(f"*/{FILE}")]
        raise FileNotFoundError(f"--sweep={folder}: holds no sweep{naming.hint(folder.name, beside)}")
    try:
        found = json_text.read(path)
        runs = {name: dict(values) for name, values in found["runs"].items()}
        if not runs:
            raise ValueError("it names no run")
        return {"config": str(found["config"]), "overrides": dict(found["overrides"]), "runs": runs}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None


def overrides(folder: Path) -> dict[str, Any]:
    """What was set on the command line for all runs of the sweep in a folder, if there is one."""
    return read(folder)["overrides"] if (folder / FILE).is_file() else {}


def refuse_a_run(folder: Path) -> None:
    """Refuses to begin a run where a sweep has its folders."""
    if (folder / FILE).exists():
        raise ValueError(
            f"--workdir={folder}: holds a sweep; give --sweep again, or continue one of its runs, such as "
            f"{folder / next(iter(read(folder)['runs']), 'NAME')}"
        )


def exit_code(failed: Mapping[str, tuple[int, str]]) -> int:
    """That of a sweep: of the machine if any run may work when it is started again, else that of the first."""
    codes = [code for code, _ in failed.values()]
    return errors.MACHINE if errors.MACHINE in codes else next(iter(codes), 0)


def in_a_process(arguments: Sequence[str], asked: Callable[[], int | None]) -> tuple[int, str]:
    """Runs `train.py`, and waits for it.

    Args:
      asked: the signal that this process received, if any; it is passed on once, and the run saves its state.

    Returns:
      Its exit code and the last error it printed.
    """
    child = subprocess.Popen(
        [sys.executable, str(errors.ROOT / "train.py"), *arguments],
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches it by us alone: a second one would end it without a save
    )
    last: list[str] = []
    reader = threading.Thread(target=_pass_on, args=(child.stderr, last), daemon=True)
    reader.start()
    told = False
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = child.wait(TICK_SECONDS)
            break
        if not told and (number := asked()):
            child.send_signal(number)
            told = True
    reader.join(timeout=2)
    if code < 0:  # by a signal, such as that of a system without memory
        return errors.MACHINE, f"killed by signal {-code}"
    return code, last[0] if last else errors.MEANING.get(code, "")


def _pass_on(stream: Iterable[str], last: list[str]) -> None:
    for line in stream:
        sys.stderr.write(line)
        sys.stderr.flush()
        if line.startswith(("error: ", "internal error: ")):
            last[:] = [line.strip().removeprefix("error: ")]


def _split(text: str, said: str) -> list[str]:
    """Parts between commas that stand in no brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in _OPEN) - (letter in _CLOSE)
        if depth < 0:
            break
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    if depth:
        raise ValueError(f"--sweep {said}: its brackets do not match")
    return parts


def _value(text: str, said: str) -> str:
    """A value as `--config.KEY=` takes it: `[a,b]` as a list of texts, `''` as an empty text."""
    if not text:
        raise ValueError(f"--sweep {said}: has an empty value; write '' for an empty text")
    if text in ("''", '""'):
        return ""
    # A regular expression may begin as a list does: [ab].*
    if not (text.startswith("[") and text.endswith("]")) or len(_split(text[1:-1], said)) < 2:
        return text
    try:
        ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return repr([part.strip() for part in _split(text[1:-1], said)])
    return text


def _in_a_name(value: str) -> str:
    """A value as part of the name of a folder; where it is not whole, with four digits that tell it from others."""
    name = re.sub(r"[^\w.+-]+", "-", value.replace(" ", "_"))[:MOST_OF_A_VALUE].strip("-") or "empty"
    whole = value.replace(" ", "_") == name or not value
    return name if whole else f"{name}-{hashlib.sha256(value.encode()).hexdigest()[:4]}"
