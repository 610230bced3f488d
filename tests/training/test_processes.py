"""Several processes are one run: real ones, by the commands that a user types, on CPU devices."""

import json
import re
import shutil
import signal
import time

import commands
import numpy as np
import pytest
import tiny
from processes_job import Job, by_slurm, by_variables, losses, saved, summary

import train
from training.checkpoints import checkpoint_files
from training.checkpoints.checkpoint import find, restore_for_eval
from training.run import command

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

STEPS, EVERY = 20, 8
# Everything that draws random numbers, and everything that has a state.
CONFIG = [
    "--config=configs/vit_digits.py",
    f"--config.train.steps={STEPS}",
    f"--config.checkpoint.every_steps={EVERY}",
    f"--config.eval.every_steps={EVERY}",
    "--config.log.every_steps=1",
    "--config.log.tensorboard=False",
    "--config.log.example_ids=True",
    f"--config.log.cache_directory={tiny.CACHE}",
    "--config.data.batch_size=16",
    "--config.data.eval_split=test[:40]",
    "--config.model.options.depth=2",
    "--config.model.options.width=32",
    "--config.model.options.mlp_width=64",
    "--config.model.dropout=0.1",
    "--config.model.drop_path=0.2",
    "--config.task.options.mixup=0.2",
    "--config.task.options.cutmix=1.0",
    "--config.optim.ema=0.9",
    "--config.optim.accumulate=2",
]
SPLIT = ["--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
# Of a float32 run: the meshes add up in another order, and AdamW divides by the size of what it adds up.
LOSS_TOLERANCE, PARAMETER_TOLERANCE = 5e-6, 1e-5


def arrays_of(workdir, step=STEPS):
    path = find(workdir, step)
    return checkpoint_files.read_arrays(path, checkpoint_files.read_about(path))


def differences(workdir, reference):
    """Largest difference of losses, and of final parameters and their averages."""
    found, wanted = restore_for_eval(workdir, STEPS), restore_for_eval(reference, STEPS)
    assert found["params"].keys() == wanted["params"].keys()
    pairs = [
        (mine["params"][name], theirs["params"][name])
        for mine, theirs in ((found, wanted), (found["ema"], wanted["ema"]))
        for name in wanted["params"]
    ]
    of_losses = np.abs(np.subtract(losses(workdir), losses(reference))).max()
    return of_losses, max(np.abs(mine - theirs).max() for mine, theirs in pairs)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One process with one device."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    Job(*CONFIG, f"--workdir={workdir}").succeed()
    assert len(losses(workdir)) == STEPS
    return workdir


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two processes with 4 devices each; parameters are split between the processes."""
    workdir = tmp_path_factory.mktemp("pair") / "run"
    out = Job(*CONFIG, *SPLIT, f"--workdir={workdir}", processes=2, devices=4).succeed()
    assert "8 x cpu (cpu), mesh data 2 x fsdp 2 x tensor 2, 2 process(es)" in out
    assert f"step {STEPS} eval" in out
    return workdir


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """As `pair`, cut short by the death of process 0."""
    workdir = tmp_path_factory.mktemp("killed") / "run"
    job = Job(*CONFIG, *SPLIT, f"--workdir={workdir}", processes=2, devices=4)
    job.signal(0, signal.SIGKILL, workdir, EVERY + 4)
    (first, _, _), (second, silence, errors) = job.end()
    assert (first, second, silence) == (-signal.SIGKILL, 75, "")
    assert re.fullmatch(r"process 0 of 2 on 127.0.0.1 was lost \(its connection broke: .*newest checkpoint\n", errors)
    assert saved(workdir)[-1] == EVERY
    return workdir


def test_one_process_and_two_and_eight_devices_agree(one, pair, tmp_path):
    eight = tmp_path / "run"
    Job(*CONFIG, *SPLIT, f"--workdir={eight}", devices=8).succeed()
    for workdir in (eight, pair):
        of_losses, of_parameters = differences(workdir, one)
        print(f"{workdir}: losses {of_losses:.1e}, parameters {of_parameters:.1e}")
        assert of_losses < LOSS_TOLERANCE
        assert of_parameters < PARAMETER_TOLERANCE
    assert np.ptp(losses(one)) > 100 * LOSS_TOLERANCE
    for name, value in summary(one)["metrics"]["test_40"].items():
        assert summary(pair)["metrics"]["test_40"][name] == pytest.approx(value, abs=1e-4), name


def test_each_process_reads_its_share(one, pair):
    whole, first, second = (
        [row["index"] for row in map(json.loads, (workdir / name).read_text().splitlines())]
        for workdir, name in ((one, "examples.jsonl"), (pair, "examples.jsonl"), (pair, "examples-1.jsonl"))
    )
    assert len(whole) == STEPS
    assert [mine + theirs for mine, theirs in zip(first, second, strict=True)] == whole
    assert {len(row) for row in first} == {8}


def test_process_0_writes_for_all(pair):
    assert {path.name for path in pair.iterdir()} == {
        *("checkpoints", "config.json", "overrides.json", "run.json", "lock", "metrics.jsonl"),
        *("summary.json", "goodput.json", "data.json"),
        *("examples.jsonl", "examples-1.jsonl"),
    }
    # The newest two, and the best before them if it is neither.
    assert saved(pair)[-2:] == [2 * EVERY, STEPS]
    assert len(saved(pair)) <= 3


def test_killed_and_continued_it_is_the_same_run(pair, killed, tmp_path):
    workdir = shutil.copytree(killed, tmp_path / "run")
    job = Job(*CONFIG, *SPLIT, f"--workdir={workdir}", processes=2, devices=4, how=by_slurm)
    assert f"resuming {workdir} from step {saved(killed)[-1]}" in job.succeed()
    arrays, expected = arrays_of(workdir), arrays_of(pair)
    assert arrays.keys() == expected.keys()
    assert not [name for name in expected if arrays[name].tobytes() != expected[name].tobytes()]
    assert losses(workdir) == losses(pair)
    assert summary(workdir)["params_sha256"] == summary(pair)["params_sha256"]
    for name in ("examples.jsonl", "examples-1.jsonl"):
        assert (workdir / name).read_text() == (pair / name).read_text()


def test_what_is_left_continues_the_run(one, killed, tmp_path):
    workdir = shutil.copytree(killed, tmp_path / "run")
    Job(*CONFIG, "--config.mesh.fsdp=2", f"--workdir={workdir}", devices=4).succeed()
    of_losses, of_parameters = differences(workdir, one)
    assert of_losses < LOSS_TOLERANCE
    assert of_parameters < PARAMETER_TOLERANCE


def test_sigterm_to_one_process_stops_all_after_the_same_step(one, tmp_path):
    workdir = tmp_path / "run"
    job = Job(*CONFIG, f"--workdir={workdir}", processes=2, how=by_variables)
    job.signal(1, signal.SIGTERM, workdir, 3)
    (code, _, errors), second = job.end()
    assert (code, second) == (75, (75, "", ""))
    step = int(re.fullmatch(r"signal 15 at step (\d+): state saved; the same command continues\n", errors)[1])
    assert saved(workdir)[-1] == step < STEPS
    np.testing.assert_allclose(losses(workdir), losses(one)[:step], rtol=0, atol=LOSS_TOLERANCE)


def test_two_processes_evaluate_what_one_trained(one, tmp_path):
    flags = [f"--workdir={one}", f"--output={tmp_path}", "--config.mesh.fsdp=2"]
    out = Job(*flags, script="eval.py", processes=2).succeed()
    assert commands.told(out).startswith("set ")
    assert {path.name for path in tmp_path.iterdir()} == {"test_40.json", "report.html"}
    found = json.loads((tmp_path / "test_40.json").read_text())["results"]
    for name, value in summary(one)["metrics"]["test_40"].items():
        assert found[name] == pytest.approx(value, abs=1e-5), name


def test_a_failure_of_one_process_is_told_to_the_others(tmp_path):
    job = Job("data", *CONFIG, f"--workdir={tmp_path}", processes=2, script="tests/faulty_train.py")
    (first, _, told), (second, _, errors) = job.end()
    assert (first, second) == (2, 2)
    assert re.fullmatch(r"error: .*/no/such/folder.*\n", errors)
    assert re.fullmatch(r"process 1 of 2 on \S+ ended: " + re.escape(errors), told)


def test_an_evaluation_that_fails_in_one_process_ends_all_with_the_state_saved(tmp_path):
    """Between two saves, and whatever is configured: nobody can finish what one of them left."""
    more = ["--config.checkpoint.every_steps=0", "--config.eval.on_error=continue"]
    flags = ["evaluation", *CONFIG, *more, f"--workdir={tmp_path}"]
    (first, _, told), (second, _, errors) = Job(*flags, processes=2, script="tests/faulty_train.py").end()
    assert (first, second) == (2, 2)
    assert errors == (
        f"error: evaluation of test_40 at step {EVERY}: 5.png: image file is truncated; the state of this step is "
        "saved, and the same command continues\n"
    )
    assert re.fullmatch(r"process 1 of 2 on \S+ ended: " + re.escape(errors), told)
    assert saved(tmp_path) == [EVERY]


def test_processes_with_other_configurations_are_refused_at_once(tmp_path):
    """By a line that says what differs; where a machine has its data is its own affair."""
    own = {1: ["--config.optim.learning_rate=1e-4", "--config.seed=3", "--config.data.directory=/elsewhere"]}
    begin = time.monotonic()
    ended = Job(*CONFIG, f"--workdir={tmp_path / 'run'}", processes=2, own=own).end()
    line = (
        r"error: process 1 of 2 on \S+ differs from process 0: config.seed is 3 for 0; config.optim.learning_rate is "
        r"0.0001 for 0.\d+; start all processes with the same command, code and packages\n"
    )
    for code, said, errors in ended:
        assert (code, said) == (2, "")
        assert re.fullmatch(line, errors), errors
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - begin < 30


def test_evaluations_of_different_sets_are_refused_at_once(one, tmp_path):
    own = {i: [f"--config.data.eval_split=test[:{20 + i}]"] for i in range(2)}
    flags = [f"--workdir={one}", f"--output={tmp_path / 'eval'}"]
    for code, _, errors in Job(*flags, script="eval.py", processes=2, own=own).end():
        assert code == 2
        assert re.search(r"differs from process 0: config.data.eval_split is test\[:21\] for test\[:20\]; ", errors)
    assert not (tmp_path / "eval").exists()


def test_a_workdir_that_only_one_process_sees_is_refused(tmp_path):
    own = {1: [f"--workdir={tmp_path / 'elsewhere'}"]}
    job = Job(*CONFIG, f"--workdir={tmp_path / 'run'}", processes=2, own=own, script="tests/impatient_train.py")
    line = r"process 1 does not see there what process 0 writes; .* a shared file system"
    for code, _, errors in job.end():
        assert code == 2
        assert re.search(line, errors)
        assert errors.count("\n") == 1
    assert not saved(tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--num_processes=two"], "--num_processes=two: must be a whole number, at least 1"),
        (["--process_id=1"], "--process_id=1: --coordinator_address (or JAX_COORDINATOR_ADDRESS) is missing"),
        (["--lost_after=0"], "--lost_after=0: must be a positive number of seconds"),
    ],
)
def test_flags_that_make_no_sense_are_one_line(flags, line, capsys, tmp_path):
    code = command.guarded(train.main, [*CONFIG, "--config.log.cache_directory=", f"--workdir={tmp_path}", *flags])
    assert (code, capsys.readouterr().err) == (2, f"error: {line}\n")
