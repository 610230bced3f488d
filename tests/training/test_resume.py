"""A run that was stopped in any way and started again by the same command ends in the same bits as one that was not."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import commands
import numpy as np
import pytest

from training.checkpoints import checkpoint_files
from training.checkpoints.checkpoint import find

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 60, 15

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


class Command:
    """`python train.py` with a run that takes a few seconds; the compilation cache is shared by all of them."""

    def __init__(self, cache: Path):
        self.arguments = [
            "train.py",
            "--config=configs/vit_digits.py",
            f"--config.log.cache_directory={cache}",
            f"--config.train.steps={STEPS}",
            f"--config.checkpoint.every_steps={EVERY}",
            "--config.eval.every_steps=0",
            "--config.log.every_steps=8",
            "--config.log.tensorboard=False",
            "--config.log.example_ids=True",
            "--config.data.batch_size=16",
            "--config.data.eval_split=test[:32]",
            "--config.model.options.depth=2",
            "--config.model.options.width=32",
            "--config.model.options.mlp_width=64",
        ]

    def start(self, workdir: Path, *more: str) -> commands.Child:
        return commands.Child([*self.arguments, f"--workdir={workdir}", *more])

    def run(self, workdir: Path, *more: str, code: int = 0) -> tuple[str, str]:
        """Output and error output of a run that ends by itself."""
        process = self.start(workdir, *more)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, err
        assert "Traceback" not in err
        return out, err

    def stop(self, workdir: Path, moment: Callable[[Path], bool], number: int) -> tuple[int, str]:
        """Starts a run and sends it a signal as soon as `moment` has come; exit code and error output."""
        process = self.start(workdir)
        deadline = time.monotonic() + 90
        while not moment(workdir):
            assert process.poll() is None, f"ended before the moment came: {process.communicate()}"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(number)
        err = process.communicate(timeout=60)[1]
        return process.returncode, err


def consumed(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "examples.jsonl").read_text().splitlines()]


def steps_taken(workdir: Path) -> int:
    """Steps noted so far by a run under way, whose last line may be half written."""
    path = workdir / "examples.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saved_steps(workdir: Path) -> list[int]:
    return sorted(int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdecimal())


def in_temporary_phase(workdir: Path) -> bool:
    return any(workdir.glob("checkpoints/*.orbax-checkpoint-tmp*"))


def final_arrays(workdir: Path) -> dict[str, np.ndarray]:
    path = find(workdir)
    assert path.name == str(STEPS)
    return checkpoint_files.read_arrays(path, checkpoint_files.read_about(path))


def assert_same_run(workdir: Path, reference: Path) -> None:
    """Parameters, optimizer, averages, random key, step, and the examples of every step, bit for bit."""
    arrays, expected = final_arrays(workdir), final_arrays(reference)
    assert {name.split("/")[0] for name in expected} >= {"params", "opt_state", "ema", "key", "step"}
    assert arrays.keys() == expected.keys()
    different = [name for name in expected if arrays[name].tobytes() != expected[name].tobytes()]
    assert not different
    assert consumed(workdir) == consumed(reference)
    hashes = [json.loads((path / "summary.json").read_text())["params_sha256"] for path in (workdir, reference)]
    assert hashes[0] == hashes[1]


def tree_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_mtime_ns}\n".encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> Command:
    return Command(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def reference(command, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    command.run(workdir)
    assert [row["step"] for row in consumed(workdir)] == list(range(1, STEPS + 1))
    return workdir


@pytest.fixture(scope="module")
def terminated(command, reference, tmp_path_factory) -> Path:
    """A run that got SIGTERM between two regular saves."""
    workdir = tmp_path_factory.mktemp("terminated") / "run"
    code, err = command.stop(workdir, lambda w: steps_taken(w) >= EVERY + 4, signal.SIGTERM)
    assert code == 75, err
    assert re.fullmatch(r"signal 15 at step (\d+): state saved; the same command continues\n", err)
    return workdir


def test_kill_at_several_moments(command, reference, tmp_path):
    workdir = tmp_path / "run"
    moments: dict[str, Callable[[Path], bool]] = {
        "after the first step": lambda w: steps_taken(w) >= 1,
        "in the temporary phase of the first save": in_temporary_phase,
        "in the temporary phase of a later save": lambda w: in_temporary_phase(w) and bool(saved_steps(w)),
        "between saves": lambda w: bool(saved_steps(w)) and steps_taken(w) >= saved_steps(w)[-1] + 4,
    }
    hit_temporary = 0
    for name, moment in moments.items():
        code, err = command.stop(workdir, moment, signal.SIGKILL)
        assert code == -signal.SIGKILL, f"{name}: {err}"
        hit_temporary += in_temporary_phase(workdir)
    assert hit_temporary, "no kill hit the temporary phase"
    assert saved_steps(workdir)[-1] < STEPS
    out, _ = command.run(workdir)
    assert re.search(rf"^resuming \S+ from step ({EVERY}|{2 * EVERY}|{3 * EVERY})$", out, re.MULTILINE)
    assert not in_temporary_phase(workdir)
    assert_same_run(workdir, reference)


def test_sigterm_saves_and_the_same_command_continues(command, reference, terminated, tmp_path):
    stopped_at = saved_steps(terminated)[-1]
    assert stopped_at % EVERY, "SIGTERM hit a step that is saved anyway"
    workdir = shutil.copytree(terminated, tmp_path / "run")
    out, _ = command.run(workdir)
    assert f"from step {stopped_at}\n" in out
    assert_same_run(workdir, reference)


def test_a_truncated_newest_checkpoint_is_reported_and_the_one_before_used(command, reference, terminated, tmp_path):
    workdir = shutil.copytree(terminated, tmp_path / "run")
    before, newest = saved_steps(workdir)[-2:]
    largest = max((workdir / "checkpoints" / str(newest)).rglob("*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    out, err = command.run(workdir)
    assert re.fullmatch(rf"checkpoint \S+/checkpoints/{newest} cannot be read \(.*\); using {before} instead\n", err)
    assert f"from step {before}\n" in out
    assert_same_run(workdir, reference)


def test_scan_may_be_toggled_on_resume(command, reference, terminated, tmp_path):
    workdir = shutil.copytree(terminated, tmp_path / "run")
    command.run(workdir, "--config.model.scan=False")
    assert consumed(workdir) == consumed(reference)
    arrays, expected = final_arrays(workdir), final_arrays(reference)
    assert arrays.keys() == expected.keys()
    for name in expected:
        if name.startswith(("params/", "ema/")):
            np.testing.assert_allclose(arrays[name], expected[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_another_configuration_is_refused(command, terminated):
    before = tree_hash(terminated)
    _, err = command.run(terminated, "--config.optim.learning_rate=0.5", "--config.seed=3", code=2)
    assert err.count("\n") == 1
    assert "optim.learning_rate" in err
    assert "seed" in err
    assert tree_hash(terminated) == before


def test_a_complete_run_says_so(command, reference):
    before = tree_hash(reference)
    out, err = command.run(reference)
    assert f"complete at step {STEPS}" in out
    assert err == ""
    assert tree_hash(reference) == before
