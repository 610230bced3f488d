"""Figures of reliability: runs that are killed, given bad input, or lose a process, over and over.

    python -m benchmarks.reliability kill [--times=50] [--seed=0] [--model=vit] [--workers=0,2]
    python -m benchmarks.reliability bad [--invocations=N] [--files=N] [--seed=0] [--jobs=2]
    python -m benchmarks.reliability lost [--times=20] [--processes=8] [--seed=0]

`kill` and `lost` start a run, end it at a random moment, give the same command again until the run is complete, and
compare with a run that nobody disturbed: parameters, optimizer, averages and random key bit for bit, and every row of
the log but for times. `bad` gives commands something wrong (`benchmarks/bad_input.py`). One line a case, a table at the
end, and exit code 1 if one case is not as promised. What was found is in docs/reliability.md.

Commands are forked from a server that has imported what they import (`tests/commands.py`), since most of the time of
such short runs would be imports.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # commands, processes_job, tiny

STEPS, SAVE, EVALUATE, LOG = 60, 5, 8, 3
# The leader of a process group of its own, as a shell makes one for each command: its data workers are in it.
LEADER = """
import os, sys
os.setsid()
import train
from training.run import command
sys.exit(command.guarded(train.main, sys.argv[1:]))
"""
TIMES = ("time", "eta_seconds", "data_wait", "goodput", "mfu")
AT_ONCE = 10.0  # seconds within which the others of a killed process are gone; on a busy machine


def arguments(workdir: Path, **changes: Any) -> list[str]:
    """A run of some seconds that has everything which could be lost: what follows `train.py`."""
    import tiny

    values = {
        "train__steps": STEPS,
        "checkpoint__every_steps": SAVE,
        "eval__every_steps": EVALUATE,
        "log__every_steps": LOG,
        "log__example_ids": True,
        "optim__ema": 0.9,
        "task__options__mixup": 0.2,
        "data__train_transforms": "random_resized_crop(16)|flip|normalize",
    }
    return ["--config=tests/defaults.py", *tiny.flags(**{**values, **changes}), f"--workdir={workdir}"]


def steps_taken(workdir: Path) -> int:
    """Steps that a run has noted; its last line may be half written."""
    path = workdir / "examples.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def rows(workdir: Path) -> list[dict[str, Any]]:
    """What a run logged, without times and speeds."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k not in TIMES and not k.startswith("lost_") and "per_second" not in k}
        for row in found
    ]


def differences(workdir: Path, reference: Path) -> list[str]:
    """In what two complete runs differ; nothing if all is well."""
    from training.checkpoints import checkpoint_files
    from training.checkpoints.checkpoint import find

    summaries = [json.loads((place / "summary.json").read_text()) for place in (workdir, reference)]
    paths = [find(place) for place in (workdir, reference)]
    states = [checkpoint_files.read_arrays(path, checkpoint_files.read_about(path)) for path in paths]
    logs, wanted = rows(workdir), rows(reference)
    examples = [(place / "examples.jsonl").read_text() for place in (workdir, reference)]
    found = []
    if summaries[0]["params_sha256"] != summaries[1]["params_sha256"]:
        found.append("params_sha256")
    if summaries[0]["metrics"] != summaries[1]["metrics"]:
        found.append("metrics of the summary")
    if states[0].keys() != states[1].keys():
        found.append("names of arrays")
    else:
        found += [name for name in states[1] if states[0][name].tobytes() != states[1][name].tobytes()]
    if logs != wanted:
        at = next((row["step"] for row, other in zip(wanted, logs, strict=False) if row != other), "the end")
        found.append(f"rows of metrics.jsonl from step {at}")
    if examples[0] != examples[1]:
        found.append("examples.jsonl")
    return found


def said_of(found: list[Any]) -> str:
    return f"DIFFERS: {found[:5]}" if found else "the same bits"


def moment(workdir: Path, printed: str, since: float) -> str:
    """In what a killed run was, by what it had written."""
    if "first step after" not in printed:
        begun = "resuming" in printed or "process(es)" in printed
        return "compilation" if begun else "start"
    steps = steps_taken(workdir)
    unfinished = [path for path in workdir.glob("checkpoints/*") if not path.name.isdecimal()]
    if any(path.stat().st_mtime >= since for path in unfinished):  # not of an earlier attempt
        return "save"
    lines = (workdir / "metrics.jsonl").read_text().splitlines() if (workdir / "metrics.jsonl").exists() else []
    evaluated = any(line.endswith("}") and re.match(rf'{{"step": {steps}, "kind": "eval', line) for line in lines[-2:])
    if not evaluated and (steps % EVALUATE == 0 or steps == STEPS):
        return "evaluation"
    return "end" if steps == STEPS else "steps"


def wait(child: Any, seconds: float, sign: Callable[[], bool] | None = None) -> bool:
    """Waits for a child's sign, if one is given, and then for some seconds; whether it still runs then."""
    deadline = time.monotonic() + seconds
    while child.poll() is None:
        if sign is not None and sign():
            deadline, sign = time.monotonic() + seconds, None
        elif sign is None and time.monotonic() >= deadline:
            return True
        time.sleep(0.002)
    return False


def kill(options: argparse.Namespace, folder: Path) -> int:
    """Kills the process group of a run at random moments; returns how many cases are not as promised."""
    import commands
    import tiny

    draw = random.Random(options.seed)

    def start(words: list[str]) -> Any:
        return commands.Child([LEADER, *words])

    references, durations = {}, {}
    model = tiny.LINEAR if options.model == "linear" else {"model__dropout": 0.1}
    kinds = [int(workers) for workers in options.workers.split(",")]
    for workers in kinds:
        references[workers] = folder / f"reference_{workers}"
        words = arguments(references[workers], data__workers=workers, **model)
        for _ in range(1 if options.model == "linear" else 2):  # the first one fills the compilation cache
            _clear(references[workers])
            begin, child = time.monotonic(), start(words)
            wait(child, 0, lambda child=child: "first step after" in _printed(child))  # type: ignore[misc]
            first = time.monotonic() - begin
            out, err = child.communicate(300)
            if child.returncode or err:
                raise SystemExit(f"an undisturbed run failed ({child.returncode}): {err}{out}")
            durations[workers] = (time.monotonic() - begin, time.monotonic() - begin - first)
        whole, after = durations[workers]
        print(f"undisturbed, {workers} workers: {whole:.1f} s, {after:.1f} s of it after the first step", flush=True)
    wrong = differences(references[kinds[-1]], references[kinds[0]])
    fell: collections.Counter[str] = collections.Counter()
    faults, kills, complete = len(wrong), 0, 0
    while kills < options.times:
        workers = kinds[complete % len(kinds)]
        workdir = folder / f"run_{complete}"
        words, chained = arguments(workdir, data__workers=workers, **model), 0
        while True:
            whole, after = durations[workers]
            late = draw.random() < 0.6
            seconds = draw.uniform(0, after if late else whole)
            since, child = time.time(), start(words)
            sign = (lambda child=child: "first step after" in _printed(child)) if late else None  # type: ignore[misc]
            if kills < options.times and wait(child, seconds, sign):
                _kill_group(child)
                printed, said = child.communicate(60)
                where = moment(workdir, printed, since)
                if child.returncode == -signal.SIGKILL:
                    kills, chained = kills + 1, chained + 1
                    fell[f"{where}, {workers} workers"] += 1
                    taken = steps_taken(workdir)
                    print(f"kill {kills}: run {complete}, {where}, {taken} of {STEPS} steps noted  {said}", flush=True)
                    continue
            printed, said = child.communicate(300)
            break
        found = differences(workdir, references[workers]) if child.returncode == 0 else [said]
        faults += bool(found)
        print(f"run {complete}: {chained} kills, {said_of(found)}", flush=True)
        complete += 1
        _clear(workdir)
    table([(where, f"{count}") for where, count in sorted(fell.items())], "moment of the kill", "kills")
    print(f"{kills} kills in {complete} runs; {faults} not as promised")
    return faults


def lost(options: argparse.Namespace, folder: Path) -> int:
    """Kills one process of several at random moments; returns how many cases are not as promised."""
    import processes_job
    import tiny

    draw = random.Random(options.seed)

    def start(workdir: Path) -> Any:
        # Short: so many processes on two cores wait for each other most of the time.
        values = {"train__steps": 24, "checkpoint__every_steps": 5, "eval__every_steps": 12, **tiny.LINEAR}
        return processes_job.Job(*arguments(workdir, **values), processes=options.processes)

    def works(workdir: Path, job: Any) -> Callable[[], bool]:
        """Whether all have met: the first one holds the lock then."""
        return lambda: f'"pid": {job.processes[0].pid},' in _text(workdir / "lock")

    reference = folder / "reference"
    begin, job = time.monotonic(), start(reference)
    wait(job.processes[0], 0, works(reference, job))
    met = time.monotonic() - begin
    job.succeed()
    duration = time.monotonic() - begin - met
    print(f"undisturbed: {met:.1f} s until all have met, {duration:.1f} s after", flush=True)
    faults = losses = complete = 0
    seconds_to_leave, victims = [], []
    while losses < options.times:
        workdir, chained = folder / f"run_{complete}", 0
        while True:
            victim, seconds = draw.randrange(options.processes), draw.uniform(0, 0.8 * duration)
            job = start(workdir)
            if losses < options.times and wait(job.processes[0], seconds, works(workdir, job)):
                before = steps_taken(workdir)
                job.processes[victim].kill()
                begin = time.monotonic()
                ended = job.end(120)
                took = time.monotonic() - begin
                if ended[victim][0] == -signal.SIGKILL:
                    losses, chained = losses + 1, chained + 1
                    wrong = [end for i, end in enumerate(ended) if i != victim and not left_well(end, victim)]
                    faults += bool(wrong) or took > AT_ONCE
                    seconds_to_leave.append(took)
                    victims.append(victim)
                    verdict = f"WRONG: {wrong[:2]}" if wrong else "all others 75 and one line"
                    print(
                        f"loss {losses}: run {complete}, process {victim} at step {before}, {took:.1f} s, {verdict}",
                        flush=True,
                    )
                    if chained < options.chain:
                        continue
                    job = start(workdir)
            ended = job.end(300)
            break
        good = all(code == 0 for code, _, _ in ended)
        found = differences(workdir, reference) if good else [end for end in ended if end[0]]
        faults += bool(found)
        print(f"run {complete}: {chained} losses, {said_of(found)}", flush=True)
        complete += 1
        _clear(workdir)
    if seconds_to_leave:
        table(
            [
                ("losses", f"{losses}"),
                ("of them process 0", f"{victims.count(0)}"),
                ("runs", f"{complete}"),
                ("seconds until all others had left, median", f"{statistics.median(seconds_to_leave):.1f}"),
                ("largest", f"{max(seconds_to_leave):.1f}"),
            ],
            "lost process",
            "",
        )
    print(f"{losses} losses in {complete} runs of {options.processes} processes; {faults} not as promised")
    return faults


def left_well(end: tuple[int, str, str], victim: int) -> bool:
    """Whether one of the others left as promised: to be started again, and with one line that names the lost one."""
    code, _, said = end
    return code == 75 and said.count("\n") == 1 and said.startswith(f"process {victim} of ")


def bad(options: argparse.Namespace, folder: Path) -> int:
    """Gives commands bad input; returns how many cases are not as promised."""
    from benchmarks import bad_input

    return bad_input.run(folder, options.invocations, options.files, options.seed, options.jobs, table)


def table(lines: list[tuple[str, ...]], *names: str) -> None:
    """Prints a table of Markdown."""
    from benchmarks.pages import markdown

    print(markdown([dict(zip(names, line, strict=True)) for line in lines]))


def _printed(child: Any) -> str:
    return _text(Path(child._streams[0]))


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _kill_group(child: Any) -> None:
    with contextlib.suppress(ProcessLookupError):  # not yet the leader of a group, or gone
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()


def _clear(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


COMMANDS: Mapping[str, Callable[[argparse.Namespace, Path], int]] = {"kill": kill, "bad": bad, "lost": lost}


@contextlib.contextmanager
def _scratch(keep: str) -> Iterator[Path]:
    if keep:
        Path(keep).mkdir(parents=True, exist_ok=True)
        yield Path(keep).resolve()
    else:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            yield Path(folder)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--times", type=int, help="kills (50) or losses (20) in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, and of which cases are taken")
    parser.add_argument("--model", choices=("vit", "linear"), default="vit", help="what is killed")
    parser.add_argument("--workers", default="0,2", help="data workers of the runs that are killed, by turns")
    parser.add_argument("--processes", type=int, default=8, help="of a run of which one is lost")
    parser.add_argument("--chain", type=int, default=5, help="most losses before a run is left alone")
    parser.add_argument("--invocations", type=int, help="so many bad invocations; all without it")
    parser.add_argument("--files", type=int, help="so many bad files; all without it")
    parser.add_argument("--jobs", type=int, default=2, help="bad cases at a time")
    parser.add_argument("--folder", default="", help="where runs are; a temporary folder without it")
    options = parser.parse_args(words)
    options.times = options.times or {"kill": 50, "lost": 20}.get(options.command, 0)
    os.environ["JAX_PLATFORMS"] = "cpu"  # before the server of `commands` imports JAX
    begin = time.monotonic()
    with _scratch(options.folder) as folder:
        faults = COMMANDS[options.command](options, folder)
    print(f"{time.monotonic() - begin:.0f} s")
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main())
