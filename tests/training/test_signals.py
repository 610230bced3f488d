"""A signal to a real run, wherever it is: it is gone soon, has its state saved, and the same command continues it."""

import json
import re
import signal
import time

import commands
import processes_job
import pytest
import tiny

import errors
from training.run import loop

pytestmark = pytest.mark.multiprocess
SOON = 3.0  # seconds
SETTINGS = dict(train__steps=6, eval__every_steps=2, checkpoint__every_steps=3, eval__sets=("more=@train[:32]",))


def flags():
    values = {**tiny.TINY, **{key.replace("__", "."): value for key, value in SETTINGS.items()}}
    options = values.pop("model.options")
    values["eval.sets"] = ",".join(values["eval.sets"])
    return [
        "--config=tests/defaults.py",
        *(f"--config.{key}={value}" for key, value in values.items()),
        *(f"--config.model.options.{key}={value}" for key, value in options.items()),
    ]


def stopped(script, place, arguments, tmp_path, number=signal.SIGTERM):
    """Exit code and error output of a command that gets a signal at a place, and how long it took to leave."""
    mark = tmp_path / "there"
    child = commands.Child(["tests/slow_train.py", script, *place.split(), mark, *arguments])
    deadline = time.monotonic() + 60
    while not mark.exists():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    begin = time.monotonic()
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    return child.returncode, said, time.monotonic() - begin


def losses_and_results(workdir):
    timeless = ("time", "images_per_second", "eta_seconds", "data_wait", "goodput", "mfu")
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in timeless and not k.startswith("lost_")} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    loop.train(tiny.config(**SETTINGS), workdir, terminal=tiny.quiet())
    return workdir


@pytest.mark.parametrize(
    ("place", "number", "step", "line"),
    [
        ("compilation 2", signal.SIGTERM, None, r"signal 15 before the first step, with nothing to save; .*"),
        # Of the first evaluation (after initial parameters and the step), with steps since the last save.
        (
            "compilation 3",
            signal.SIGTERM,
            2,
            r"signal 15 in the evaluation of step 2, .*: state saved; .*",
        ),
        # In the second set of the second evaluation: nothing of the first set stays either.
        (
            "evaluation 4",
            signal.SIGTERM,
            4,
            r"signal 15 in the evaluation of step 4, .*: state saved; .*",
        ),
        # Of the last evaluation, in the run that had taken all steps.
        ("evaluation 6", signal.SIGINT, 6, r"signal 2 in the evaluation of step 6, .*: state saved; .*"),
    ],
)
def test_a_run_is_left_soon_and_continued(place, number, step, line, whole, tmp_path):
    workdir = tmp_path / "run"
    code, said, seconds = stopped("train.py", place, [*flags(), f"--workdir={workdir}"], tmp_path, number)
    assert code == (errors.INTERRUPTED if number == signal.SIGINT else errors.AGAIN), said
    assert re.fullmatch(line + "the same command continues\n", said), said
    assert seconds < SOON
    saved = [int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdecimal()]
    assert max(saved, default=None) == step
    dropped = [row for row in tiny.rows(workdir, "eval/test") if row["step"] == step] if step else []
    assert not dropped
    result = loop.train(tiny.config(**SETTINGS), workdir, terminal=tiny.quiet())
    assert result["params_sha256"] == json.loads((whole / "summary.json").read_text())["params_sha256"]
    assert losses_and_results(workdir) == losses_and_results(whole)


@pytest.mark.parametrize("place", ["compilation 1", "evaluation 2"])
def test_an_evaluation_that_is_interrupted_is_no_result(place, whole, tmp_path):
    output = tmp_path / "eval"
    arguments = [f"--workdir={whole}", f"--output={output}"]
    code, said, seconds = stopped("eval.py", place, arguments, tmp_path)
    assert code == errors.AGAIN, said
    assert said == "signal 15 before anything was written; the same command starts again\n"
    assert seconds < SOON
    assert not output.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("place", "step"), [("compilation 2", []), ("evaluation 2", [2])])
def test_of_several_processes_all_leave_when_one_is_asked_to(place, step, tmp_path):
    workdir, mark = tmp_path / "run", tmp_path / "there"
    arguments = ["train.py", *place.split(), mark, *flags(), f"--workdir={workdir}"]
    job = processes_job.Job(*arguments, script="tests/slow_train.py", processes=2)
    deadline = time.monotonic() + 60
    while not mark.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.5)  # both of them
    begin = time.monotonic()
    job.processes[1].send_signal(signal.SIGINT)
    (first, _, told), (second, _, said) = job.end()
    assert time.monotonic() - begin < SOON
    assert (first, second) == (errors.AGAIN, errors.INTERRUPTED)
    assert re.fullmatch(r"signal 2 .*; the same command continues\n", said)
    assert re.fullmatch(r"process 1 of 2 on \S+ ended: " + re.escape(said), told)
    assert processes_job.saved(workdir) == step
