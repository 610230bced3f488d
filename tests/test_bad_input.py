"""Bad input through the real commands: one clear line, a non-zero exit, no traceback, and nothing lost.

Every case is a command with something wrong. What lies in its workdir before (files of an earlier run, or nothing) has
to lie there unchanged afterwards; a command that is refused before it starts may add nothing either.
"""

import dataclasses
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from commands import run
from PIL import Image
from tiny import flags

import errors

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.multiprocess


def tree(folder):
    """Contents of a folder by path."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run with two checkpoints, made once."""
    from training.run import loop

    folder = tmp_path_factory.mktemp("finished") / "run"
    loop.train(tiny.config(checkpoint__every_steps=2), folder, terminal=tiny.quiet())
    return folder


def picture(path, size=(16, 16), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)


def class_folders(root, classes=("cat", "dog"), count=24):
    for label in classes:
        for i in range(count):
            picture(root / label / f"{i}.png", seed=i)
    return root


@dataclasses.dataclass
class Case:
    """One bad input.

    Attributes:
      message: regular expression that the line on stderr matches.
      arguments: of `train.py`, after `--config` and the tiny overrides, or of another command given by `command`.
      prepare: `(tmp_path, finished) -> extra arguments`; sets the scene.
      starts: the run gets under way before it fails, so that it may add files.
      workdir: whether to start from a copy of the finished run in place of an absent folder.
    """

    name: str
    message: str
    arguments: dict = dataclasses.field(default_factory=dict)
    prepare: Callable | None = None
    command: str = "train.py"
    starts: bool = False
    workdir: bool = False
    env: dict = dataclasses.field(default_factory=dict)


def folder_with(change):
    def prepare(tmp_path, finished):
        root = class_folders(tmp_path / "images")
        change(root)
        return [f"--config.data.name=folder:{root}", "--config.data.batch_size=8"]

    return prepare


def unfinished(path):
    (path / "summary.json").unlink()


def corrupt_all(path):
    unfinished(path)
    for file in (path / "checkpoints").rglob("*"):
        if file.is_file() and file.stat().st_size > 200:
            file.write_bytes(file.read_bytes()[:50])


def weights(family, change=lambda arrays: None):
    """A file of official weights of a tiny model of a family, after a change."""

    def prepare(tmp_path, finished):
        import tiny_models

        import models

        arrays = {name: np.array(array) for name, array in models.export_weights(tiny_models.create(family)).items()}
        change(arrays)
        np.savez(tmp_path / "w.npz", **arrays)
        return [f"--config.model.init_from={tmp_path / 'w.npz'}", "--config.model.options.depth=3"]

    return prepare


def two_sets(arrays):
    for name in list(arrays):
        arrays[f"model.{name}"] = arrays[f"model_ema.{name}"] = arrays.pop(name)


CASES = [
    # Configuration (10).
    Case(
        "unknown key", r"config.optim.lerning_rate: no such key \(nearest: learning_rate\)", {"optim.lerning_rate": 1}
    ),
    Case("wrong type", r"config.data.batch_size='many': takes a whole number", {"data.batch_size": "many"}),
    Case(
        "impossible value", r"config.optim.learning_rate=-1.0: takes a number, at least 0", {"optim.learning_rate": -1}
    ),
    Case("bad duration", r"config.train.steps='ten': takes a duration such as", {"train.steps": "ten"}),
    Case("unknown model", r"vit_z16.*nearest.*vit_", {"model.name": "vit_z16"}),
    Case("unknown model option", r"pool_kind.*nearest|pool_kind.*pool", {"model.options.pool_kind": "avg"}),
    Case("unknown task", r"classificaton.*classification", {"task.name": "classificaton"}),
    Case("unknown transform", r"flipp.*flip", {"data.train_transforms": "flipp|normalize"}),
    Case("freeze matches nothing", r"freeze.*blocks.77", {"optim.freeze": "blocks.77.*"}),
    Case(
        "unknown optimizer of optax",
        r"config.optim.name=optax:NAME: unknown name 'adamm'; .*; nearest: adam$",
        {"optim.name": "optax:adamm"},
    ),
    Case("warm-up longer than the run", r"warmup=50 .* more than config.train.steps=4", {"optim.warmup": 50}),
    # Command line.
    Case("unknown flag", r"--workdri=x: no such flag \(nearest: --workdir\)", prepare=lambda t, f: ["--workdri=x"]),
    Case(
        "workdir is a file",
        r"is a file, not a folder",
        prepare=lambda t, f: [((t / "file").write_text("x"), f"--workdir={t / 'file'}")[1]],
    ),
    Case(
        "workdir cannot be written",
        r"cannot be written|cannot be made",
        prepare=lambda t, f: ["--workdir=/proc/nowhere/run"],
    ),
    Case("another configuration", r"optim.learning_rate: 0.001 -> 0.5", {"optim.learning_rate": 0.5}, workdir=True),
    Case(
        "damaged config.json",
        r"config.json: cannot be read",
        workdir=True,
        prepare=lambda t, f: (t / "run" / "config.json").write_text("{") and [],
    ),
    # Mesh.
    Case("mesh does not fit the devices", r"fsdp=3 .* does not divide the 1 devices", {"mesh.fsdp": 3}),
    Case(
        "batch not divisible by devices",
        r"config.data.batch_size=12: must be a multiple of 8",
        {"data.batch_size": 12},
        env={"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    ),
    Case(
        "tensor axis does not divide",
        r"config.mesh.tensor=8: does not divide",
        {"mesh.tensor": 8, "model.options.width": 12, "model.options.heads": 2},
        env={"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    ),
    Case(
        "evaluation batch not divisible",
        r"config.eval.batch_size=9: must be a multiple of 2",
        {"eval.batch_size": 9},
        env={"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    ),
    # Model and shapes.
    Case("image not divisible by patch", r"20 x 20 is not divisible by the patch of 8 x 8", {"data.image_size": 20}),
    Case("heads do not divide the width", r"width 16 is not divisible by 3 heads", {"model.options.heads": 3}),
    Case("unknown attention", r"dens.*dense", {"model.attention": "dens"}),
    Case(
        "transforms end in another size",
        r"field 'image' .*\(8, 8, 3\).* the task takes \(16, 16, 3\)",
        {"data.train_transforms": "resize(8)|normalize"},
    ),
    Case(
        "grey images for a colour model",
        r"field 'image' .*\(16, 16, 1\).* the task takes \(16, 16, 3\)",
        {"data.name": "digits", "data.train_transforms": "resize(16)|normalize(mean=0.5, std=0.5)"},
    ),
    # Data.
    Case("folder missing", r"folder .*nowhere does not exist", {"data.name": "folder:nowhere"}),
    Case(
        "folder without classes",
        r"holds no class folder",
        prepare=lambda t, f: [((t / "e").mkdir(), f"--config.data.name=folder:{t / 'e'}")[1]],
    ),
    Case(
        "empty class folder",
        r"class folder .*bird holds no image",
        prepare=folder_with(lambda root: (root / "bird").mkdir()),
    ),
    Case(
        "image of 0 bytes",
        r"7.png: it has 0 bytes",
        prepare=folder_with(lambda root: (root / "cat" / "7.png").write_bytes(b"")),
        starts=True,
    ),
    Case(
        "truncated image",
        r"cannot decode image .*8.png",
        prepare=folder_with(
            lambda root: (root / "dog" / "8.png").write_bytes((root / "dog" / "8.png").read_bytes()[:100])
        ),
        starts=True,
    ),
    Case(
        "no image at all",
        r"9.png: not an image",
        prepare=folder_with(lambda root: (root / "cat" / "9.png").write_text("hello")),
        starts=True,
    ),
    Case(
        "NaN in an image",
        r"cannot decode image .*5.tif: it holds NaN or infinite values",
        prepare=folder_with(
            lambda root: Image.fromarray(np.full((16, 16), np.nan, np.float32)).save(root / "cat" / "5.tif")
        ),
        starts=True,
        arguments={"train.steps": 8},
    ),
    Case(
        "image too small for the batch of one shape",
        r"field 'image' has shapes|field 'image' of the data has shape",
        {"train.steps": 8},
        prepare=folder_with(lambda root: picture(root / "cat" / "3.png", (8, 8))),
        starts=True,
    ),
    Case("unknown set", r"imagenet2013", {"data.name": "imagenet2013"}),
    Case("split does not exist", r"trian.*train", {"data.train_split": "trian"}),
    Case("empty split", r"train\[:0\]|no example", {"data.train_split": "train[:0]"}),
    Case("malformed evaluation set", r"eval.sets: 'seen' is not 'label=source@split'", {"eval.sets": "seen"}),
    Case(
        "set without labels",
        r"label",
        prepare=lambda t, f: [
            f"--config.data.name=images:{class_folders(t / 'i')}",
            "--config.data.train_split=all",
            "--config.data.eval_split=all",
        ],
    ),
    # Weights.
    Case("init_from missing", r"no workdir or checkpoint .*nowhere", {"model.init_from": "nowhere"}),
    Case(
        "init_from of another model",
        r"init_from=.*do not fit the model",
        {"model.options.width": 32},
        prepare=lambda t, f: [f"--config.model.init_from={f}"],
        starts=True,
    ),
    Case(
        "init_from of another family",
        r"init_from=.*w.npz: the weights do not fit the model: it looks like swin \(.*\), not vit; \d+ missing; ",
        prepare=weights("swin"),
        starts=True,
    ),
    Case(
        "init_from with several sets of weights",
        r"w.npz holds several sets of weights: model \(raw\), model_ema \(averaged\); choose by config.model.init_wei",
        prepare=weights("vit", two_sets),
        starts=True,
    ),
    Case(
        "NaN in weights",
        r"w.npz: norm.weight holds NaN or infinity$",
        prepare=weights("vit", lambda arrays: arrays["norm.weight"].fill(np.nan)),
        starts=True,
    ),
    Case("init_weights alone", r"init_weights=ema: needs config.model.init_from", {"model.init_weights": "ema"}),
    Case(
        "teacher missing",
        r"no workdir or checkpoint .*nowhere",
        {"task.options.teacher": "nowhere", "task.options.distill": "soft"},
    ),
    Case(
        "every checkpoint damaged", r"cannot be read", workdir=True, prepare=lambda t, f: corrupt_all(t / "run") or []
    ),
    Case(
        "checkpoint of another model",
        r"does not fit this model|another configuration",
        {"model.options.mlp_width": 64},
        workdir=True,
        prepare=lambda t, f: unfinished(t / "run") or [],
    ),
    # While it runs.
    Case(
        "loss not finite",
        r"step \d+: loss or gradient is not finite; gradients not finite in",
        {"optim.learning_rate": "1e30", "optim.name": "sgd", "train.steps": 8},
        starts=True,
    ),
    Case("package not installed", r"wandb is not installed", {"log.wandb": "project"}, starts=True),
    # Evaluation.
    Case("flag without a value", r"--predict=: needs a value", command="eval.py", prepare=lambda t, f: ["--predict="]),
    Case("eval without workdir", r"--workdir=FOLDER is missing", command="eval.py"),
    Case(
        "eval of a missing workdir",
        r"no workdir or checkpoint .*nowhere",
        command="eval.py",
        prepare=lambda t, f: ["--workdir=nowhere"],
    ),
    Case(
        "eval of an empty workdir",
        r"no checkpoint in",
        command="eval.py",
        prepare=lambda t, f: [((t / "e").mkdir(), f"--workdir={t / 'e'}")[1]],
    ),
    Case(
        "eval of a missing step",
        r"no checkpoint of step 77 .*available: 2, 4",
        command="eval.py",
        workdir=True,
        prepare=lambda t, f: [f"--workdir={t / 'run'}", "--step=77"],
    ),
    Case(
        "eval with the wrong model",
        r"do not fit the model",
        command="eval.py",
        workdir=True,
        prepare=lambda t, f: [f"--workdir={t / 'run'}", "--config.model.options.width=32"],
    ),
    Case(
        "predict a missing folder",
        r"folder nowhere does not exist",
        command="eval.py",
        workdir=True,
        prepare=lambda t, f: [f"--workdir={t / 'run'}", "--predict=nowhere"],
    ),
    Case(
        "predict a folder without images",
        r"holds no image",
        command="eval.py",
        workdir=True,
        prepare=lambda t, f: [
            (
                (t / "e").mkdir(),
                f"--workdir={t / 'run'}",
            )[1],
            f"--predict={t / 'e'}",
        ],
    ),
]


def test_there_are_forty_cases_and_at_most_ten_are_configuration():
    assert len(CASES) + 3 >= 40  # three more below need a process that is acted on
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_one_clear_line_and_nothing_lost(case, tmp_path, finished):
    workdir = tmp_path / "run"
    if case.workdir:
        shutil.copytree(finished, workdir)
    extra = case.prepare(tmp_path, finished) if case.prepare else []
    before = tree(tmp_path)
    arguments = [case.command, *extra]
    if case.command == "train.py":
        arguments = [
            case.command,
            "--config=tests/defaults.py",
            *flags(),
            *(f"--config.{k}={v}" for k, v in case.arguments.items()),
            *extra,
        ]
        if not any(argument.startswith("--workdir") for argument in extra):
            arguments.append(f"--workdir={workdir}")
    done = run(arguments, {"FOVEA_CACHE": str(tiny.CACHE / "data"), **case.env})
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == errors.INPUT, done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert lines[-1].startswith("error: "), done.stderr
    assert re.search(case.message, lines[-1]), done.stderr
    assert len(lines) == 1 or (case.starts or case.workdir), done.stderr
    after = tree(tmp_path)
    kept = {path: after.get(path) for path in before}
    assert kept == before
    if not case.starts:
        assert after == before


def start(arguments, env=None):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "FOVEA_CACHE": str(tiny.CACHE / "data"), **(env or {})}
    return subprocess.Popen(
        [sys.executable, "train.py", "--config=tests/defaults.py", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def children(parent):
    stats = [[*p.read_text().rpartition(") ")[2].split(), p.parent.name] for p in Path("/proc").glob("[0-9]*/stat")]
    return [int(fields[-1]) for fields in stats if int(fields[1]) == parent]


def test_a_killed_data_worker_ends_the_run_with_one_line(tmp_path):
    process = start(
        [*flags(train__steps=100000, data__workers=2, log__every_steps=20), f"--workdir={tmp_path / 'run'}"]
    )
    for line in process.stdout:
        if line.startswith("step "):
            break
    workers = [pid for pid in children(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == errors.MACHINE
    assert re.search(r"^error: data worker process \d+ .*(kill|SIGKILL|9)", err, re.MULTILINE), err
    assert "Traceback" not in err


def test_debug_shows_the_traceback(tmp_path):
    done = run(
        [
            "train.py",
            "--config=tests/defaults.py",
            *flags(data__image_size=20),
            f"--workdir={tmp_path / 'run'}",
            "--debug",
        ]
    )
    assert done.returncode == 2
    assert "Traceback" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_a_full_disk_in_a_save_is_one_line_and_earlier_checkpoints_stay(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not allow mounts")
    try:
        process = start(
            [
                *flags(
                    train__steps=100000,
                    checkpoint__every_steps=10,
                    checkpoint__keep_last=100,
                    log__every_steps=1000,
                    model__options={**tiny.TINY["model.options"], "mlp_width": 1024},
                ),
                f"--workdir={disk / 'run'}",
            ]
        )
        _, err = process.communicate(timeout=120)
        assert process.returncode == errors.MACHINE
        assert re.search(r"^error: .*(could not be saved|No space left).*", err, re.MULTILINE), err
        assert "Traceback" not in err
        from training.checkpoints import checkpoint

        newest = max(int(p.name) for p in (disk / "run" / "checkpoints").iterdir() if p.name.isdigit())
        assert f"newest complete one is {newest}" in err
        assert checkpoint.restore_for_eval(disk / "run")["step"] == newest
    finally:
        time.sleep(0.2)
        subprocess.run(["umount", "-l", str(disk)], check=True)
