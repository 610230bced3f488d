"""Bad input for `python -m benchmarks.reliability bad`: wrong invocations and broken files, made by rule.

Invocations: a wrong value and a misspelt name of every key, by its declaration in `configs/base.py` and in the task's
options; every flag misspelt, without its value and with a wrong one; combinations that cannot work; folders that are no
workdirs; a wrong name in every registry. Files: pictures, weights, configuration files and every file of a workdir,
each damaged in several ways.

As promised is a case that ends with code 2 (or 74 where the machine is at fault) and one line on stderr, with all that
was there before unchanged. Files that a run can do without (logs, a summary, a newest checkpoint that has an older one)
do not stop it: it ends with 0 after one line that says so, or none if nothing is lost.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import errors
from benchmarks import bad_files


@dataclasses.dataclass(frozen=True)
class Scene:
    """Where a case plays: a folder of its own, and a finished run with the checkpoints of steps 2 and 4."""

    folder: Path
    finished: Path

    def train(self, *more: str, vit: bool = False, **changes: Any) -> list[str]:
        """A run of some steps, of a model that takes no time, or of a small ViT."""
        import tiny

        values = {} if vit else tiny.LINEAR
        words = ["train.py", "--config=tests/defaults.py", *tiny.flags(**{**values, **changes}), *more]
        return words if any(w.startswith("--workdir") for w in more) else [*words, f"--workdir={self.folder / 'run'}"]

    def run(self) -> Path:
        """A copy of the finished run, as a run that was stopped before its end."""
        workdir = shutil.copytree(self.finished, self.folder / "run")
        (workdir / "summary.json").unlink()
        shutil.rmtree(workdir / "checkpoints" / "4")
        return workdir


@dataclasses.dataclass(frozen=True)
class Case:
    """`words` prepares a scene and gives the command; with `heals` it may also end well."""

    group: str
    name: str
    words: Callable[[Scene], list[str]]
    heals: bool = False


MOST_SECONDS = 150
WRONG_NAMES = {
    "model.name": ["vit_z16", "vit", ""],
    "model.attention": ["dens"],
    "model.remat": ["some"],
    "model.init_from": ["/nowhere", "tests"],
    "task.name": ["clasification", "math:pi", "nowhere:Task"],
    "data.name": ["digit", "folder:/nowhere", "folder:", "idx:/nowhere", "images:/nowhere", "synthetic:classes=no"],
    "data.train_split": ["trian", "train[9", "train[:0]", "train[50%:20%]", ""],
    "data.eval_split": ["tset", "test[1000:]", "test+"],
    "data.train_transforms": ["flop", "resize(", "resize(16)|", "flip|normalise", "crop(size=a)", "normalize(mean=a)"],
    "data.eval_transforms": ["resize(-3)|normalize", "normalize|1", "center_crop(16, 16, 16)", "{sise}"],
    "eval.sets": ["seen", "seen=@", "a=nowhere@test", "a=@tset", "a=@test,a=@test"],
    "eval.fit": ["@train", "nowhere"],
    "log.wandb": ["project"],
    "log.cache_directory": [],
    "data.directory": [],
}
NOT_OF_EVALUATIONS = ("model.init_from", "data.train_split", "data.train_transforms", "eval.fit", "log.wandb")
OUTSIDE = "tests/defaults.py"  # a file where a folder is wanted


def wrong_values(key: str, field: Any) -> list[str]:
    """Texts that are no value of a key."""
    from configs.duration import Duration
    from configs.size import Size

    if key in WRONG_NAMES:
        return WRONG_NAMES[key]
    kind = field.kind or type(field.default)
    if field.choices:
        some = str(field.choices[0])
        return [some + "x", some.upper() + "!", ""]
    if kind is Duration:
        return ["ten", "-5", "5 parsecs", "nan"]
    if kind is Size:
        return ["0", "16x", "axb", "16x16x16", "-16"]
    if kind is bool:
        return ["maybe", "2"]
    if kind in (int, float):
        beyond = [f"{field.high + 1}"] if field.high is not None else ["1e999"]
        below = [f"{field.low - 1}"] if field.low is not None else []
        return ["many", "nan", *below, *beyond, *(["1.5"] if kind is int else []), "1,2", ""]
    if kind is tuple:
        return {
            "data.mean": ["a,b,c", "0.5"],
            "data.std": ["0,1,1", "0.2,0.2"],
            "data.pixel_range": ["5", "9,3", "a,b"],
            "optim.freeze": ["(", "nowhere.*", "*"],
        }.get(key, [])
    if kind is dict:
        return ["text", "5", "[1]"]
    return []


def keys() -> Iterator[Case]:
    """A wrong value of every key, and every key misspelt, for both commands."""
    from configs import base, schema
    from tasks.classification import OPTIONS

    fields = {**schema.flatten(base.FIELDS), **{f"task.options.{name}": field for name, field in OPTIONS.items()}}
    for key, field in fields.items():
        for value in wrong_values(key, field):
            word = f"--config.{key}={value}"
            yield Case("key", word, functools.partial(_trained, word=word))
        for wrong in {key + "s", key.replace("_", ""), f"x{key}"} - {key}:
            word = f"--config.{wrong}={field.default}"
            yield Case("misspelt key", word, functools.partial(_trained, word=word))
        if key.partition(".")[0] in ("optim", "checkpoint", "train"):
            yield Case("key", f"eval --config.{key}", functools.partial(_evaluated, words=[f"--config.{key}=1"]))
        elif key not in NOT_OF_EVALUATIONS and (values := wrong_values(key, field)):
            words = [f"--config.{key}={values[0]}"]
            yield Case("key", f"eval {words[0]}", functools.partial(_evaluated, words=words))


def flags() -> Iterator[Case]:
    """Flags that are misspelt, lack their value, or have a wrong one; and what excludes each other."""
    trained = ("workdir", "resume_from", "print_config", "dry_run", "profile", "plan", "no_batch_search", "debug")
    evaluated = ("workdir", "checkpoint", "step", "raw", "ema", "predict", "generate", "export", "output", "debug")
    several = ("coordinator_address", "num_processes", "process_id", "start_timeout", "lost_after")
    valued = {*several, *evaluated, *trained} - {"print_config", "dry_run", "profile", "no_batch_search", "debug"}
    valued -= {"raw", "ema"}
    for make, names in ((_trained_by, trained + several), (_evaluated, evaluated + several)):
        command = "train" if make is _trained_by else "eval"
        for name in names:
            yield Case("flag", f"{command} --{name[:-1]}", functools.partial(make, words=[f"--{name[:-1]}"]))
            if name in valued:
                yield Case("flag", f"{command} --{name}", functools.partial(make, words=[f"--{name}"]))
            else:
                yield Case("flag", f"{command} --{name}=1", functools.partial(make, words=[f"--{name}=1"]))
        for words in (
            ["--num_processes=two"],
            ["--num_processes=0"],
            ["--process_id=-1", "--num_processes=2", "--coordinator_address=127.0.0.1:1"],
            ["--process_id=2", "--num_processes=2", "--coordinator_address=127.0.0.1:1"],
            ["--coordinator_address=nowhere", "--num_processes=2", "--process_id=1"],
            ["--coordinator_address=127.0.0.1:99999", "--num_processes=2", "--process_id=0"],
            ["--coordinator_address=127.0.0.1:1", "--num_processes=2", "--process_id=1", "--start_timeout=0.2"],
            ["--lost_after=-1"],
            ["--start_timeout=soon"],
            ["stray"],
        ):
            yield Case("flag", f"{command} {' '.join(words)}", functools.partial(make, words=words))
    for words in (
        ["--step=first"],
        ["--step=-1"],
        ["--step=3"],
        ["--generate=0"],
        ["--generate=x"],
        ["--generate=2"],
        ["--predict=/nowhere"],
        ["--predict=nowhere@test"],
        ["--predict="],
        ["--raw", "--ema"],
        ["--export=x", "--predict=tests"],
        ["--export=x", "--output=y"],
        ["--export=/proc/x"],
        ["--output=/proc/x"],
        [f"--output={OUTSIDE}"],
        ["--checkpoint=/nowhere"],
        ["--config=/nowhere.py"],
        ["--config=tests"],
        ["--config=tests/defaults.py:argument"],
        ["--config"],
    ):
        yield Case("flag", f"eval {' '.join(words)}", functools.partial(_evaluated, words=words))
    for words in (
        ["--config=/nowhere.py"],
        ["--config=tests"],
        ["--config=README.md"],
        ["--config=tests/defaults.py:argument"],
        ["--config="],
        ["--plan=v9:2x2"],
        ["--plan=v5e:3x"],
        ["--dry_run", "--resume_from=x"],
        ["--resume_from=/nowhere"],
        ["--resume_from=tests@x"],
        ["--resume_from=tests"],
    ):
        yield Case("flag", f"train {' '.join(words)}", functools.partial(_trained_by, words=words))


def combinations() -> Iterator[Case]:
    """Values that are good alone."""
    for changes in (
        {"optim__warmup": 3, "optim__cooldown": 3, "optim__schedule": "constant"},
        {"data__batch_size": 16, "optim__accumulate": 3},
        {"data__mean": "0.5"},
        {"train__steps": "50%"},
        {"train__steps": 0},
        {"mesh__fsdp": 2},
        {"mesh__data": 0},
        {"mesh__data": 3},
        {"mesh__tensor": 4, "mesh__fsdp": 4},
        {"data__image_size": 20},
        {"data__image_size": "16x20"},
        {"data__train_transforms": "resize(8)|normalize"},
        {"data__train_transforms": "flip"},
        {"data__eval_transforms": "resize(24)|normalize"},
        {"data__name": "digits"},
        {"data__eval_split": "test[:0]"},
        {"task__options__distill": "soft"},
        {"task__options__teacher": "/nowhere", "task__options__distill": "hard"},
        {"task__options__teacher": "/nowhere"},
        {"task__options__token_labels": 0.5, "task__options__distill": "soft"},
        {"task__options__nothing": 1},
        {"model__init_weights": "ema"},
        {"model__options__pool_kind": "avg"},
        {"model__options__depth": 0},
        {"model__options__depth": "many"},
        {"model__options__patch_size": 5},
        {"model__options__heads": 3},
        {"optim__name": "optax:adamm"},
        {"optim__name": "optax:"},
        {"optim__name": "optax:adam", "optim__options__epsilon": 1},
        {"optim__options__eps": 1},
        {"optim__nesterov": True},
        {"optim__layer_decay": 0.5, "optim__freeze": ".*"},
        {"optim__b1": 1.5},
        {"eval__sets": "train=@train[:8],train=@train[:16]"},
        {"eval__sets": "other=digits@test"},
        {"eval__batch_size": -4},
        {"data__workers": -1},
        {"data__pixel_range": "0,1,2"},
    ):
        name = " ".join(f"{key.replace('__', '.')}={value}" for key, value in changes.items())
        yield Case("combination", name, functools.partial(_changed, changes=changes))


def workdirs() -> Iterator[Case]:
    """Folders that are no workdir, or another run's."""

    def place(make: Callable[[Scene], Any], *more: str, command: str = "train.py") -> Callable[[Scene], list[str]]:
        def words(scene: Scene) -> list[str]:
            found = make(scene)
            place = f"--workdir={found}"
            return scene.train(place, *more) if command == "train.py" else [command, place]

        return words

    def empty(scene: Scene) -> Path:
        (scene.folder / "empty").mkdir()
        return scene.folder / "empty"

    def file(scene: Scene) -> Path:
        (scene.folder / "file").write_text("x")
        return scene.folder / "file"

    def loop(scene: Scene) -> Path:
        (scene.folder / "loop").symlink_to(scene.folder / "loop")
        return scene.folder / "loop"

    def long(scene: Scene) -> Path:
        return scene.folder / ("x" * 300)

    kinds: dict[str, Callable[[Scene], Any]] = {
        "a file": file,
        "below a file": lambda scene: file(scene) / "run",
        "a link to itself": loop,
        "a name too long": long,
        "in /proc": lambda scene: "/proc/nowhere",
        "in /dev/null": lambda scene: "/dev/null/run",
    }
    for name, make in kinds.items():
        yield Case("workdir", f"train: {name}", place(make))
        yield Case("workdir", f"eval: {name}", place(make, command="eval.py"))
    yield Case("workdir", "eval: empty", place(empty, command="eval.py"))
    for key, value in (("seed", 1), ("optim.learning_rate", 0.5), ("model.options.width", 32), ("data.batch_size", 8)):
        yield Case("workdir", f"another {key}", place(Scene.run, f"--config.{key}={value}"))
    for word in ("model.options.width=32", "model.name=vit_ti16", "data.name=digits"):
        words, key = [f"--config.{word}"], word.partition("=")[0]
        yield Case("workdir", f"eval: another {key}", functools.partial(_evaluated, words=words))
    yield Case("workdir", "branch into itself", place(Scene.run, "--resume_from=tests"))


def _trained(scene: Scene, word: str) -> list[str]:
    return scene.train(word, vit=word.startswith("--config.model"))


def _trained_by(scene: Scene, words: Sequence[str]) -> list[str]:
    return scene.train(*words)


def _changed(scene: Scene, changes: dict[str, Any]) -> list[str]:
    words = [f"--config.{key.replace('__', '.')}={value}" for key, value in changes.items()]
    return scene.train(*words, vit=any(key.startswith("model") for key in changes))


def _evaluated(scene: Scene, words: Sequence[str]) -> list[str]:
    workdir = shutil.copytree(scene.finished, scene.folder / "run")
    if any(word.startswith("--checkpoint") for word in words):
        return ["eval.py", *words]
    return ["eval.py", f"--workdir={workdir}", *words]


def invocations() -> list[Case]:
    """All of them."""
    return [*flags(), *combinations(), *workdirs(), *keys()]


def tree(folder: Path) -> dict[str, str]:
    """What lies in a folder: contents by path, and where links lead."""
    return {
        str(path.relative_to(folder)): f"-> {path.readlink()}"
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


class Playing:
    """A case whose command runs."""

    def __init__(self, case: Case, scene: Scene):
        import commands
        import tiny

        self.case, self.scene, self.words = case, scene, case.words(scene)
        self.before = tree(scene.folder)
        self.begin = time.monotonic()
        self.child = commands.Child(self.words, {**os.environ, "FOVEA_CACHE": str(tiny.CACHE / "data")})

    def ended(self) -> bool:
        return self.child.poll() is not None or time.monotonic() - self.begin > MOST_SECONDS

    def verdict(self) -> tuple[str, str]:
        """`refused`, `healed` or what is wrong; and the line that the command said."""
        try:
            printed, said = self.child.communicate(0.1)
        except subprocess.TimeoutExpired:
            return f"WRONG: it takes more than {MOST_SECONDS} s", ""
        code, lines = self.child.returncode, said.splitlines()
        line = lines[0] if lines else ""
        if code == 0 and self.case.heals:
            result = "summary.json" if self.words[0] == "train.py" else "eval/report.html"
            healed = len(lines) <= 1 and (self.scene.folder / "run" / result).is_file()
            return ("healed", line) if healed else ("WRONG: not healed", said)
        if code not in (errors.INPUT, errors.MACHINE):
            return f"WRONG: code {code}", said[-1500:]
        if len(lines) != 1 or "Traceback" in said + printed:
            return f"WRONG: {len(lines)} lines", said[-1500:]
        after = tree(self.scene.folder)
        # The lock says who was there last.
        changed = [path for path in self.before if after.get(path) != self.before[path] and path != "run/lock"]
        return (f"WRONG: changed {', '.join(changed[:3])}", line) if changed else ("refused", line)


def play(cases: Sequence[Case], folder: Path, finished: Path, jobs: int) -> list[tuple[Case, str]]:
    """Plays all cases, some at a time, says each, and returns them with what came of them."""
    waiting, results = list(enumerate(cases)), []
    playing: list[Playing] = []
    while waiting or playing:
        if waiting and len(playing) < jobs:
            number, case = waiting.pop(0)
            place = folder / f"case_{number}"
            place.mkdir()
            playing.append(Playing(case, Scene(place, finished)))
        for one in [one for one in playing if one.ended()]:
            playing.remove(one)
            found, line = one.verdict()
            place = one.scene.folder
            shutil.rmtree(place, ignore_errors=True)
            said = f"{one.case.group}: {one.case.name}: {found}: {line.strip()}"
            print(said.replace(str(place), "..."), flush=True)
            results.append((one.case, found))
        time.sleep(0.005)
    return results


def run(
    folder: Path,
    most_invocations: int | None,
    most_files: int | None,
    seed: int,
    jobs: int,
    table: Callable[..., None],
) -> int:
    """Runs all cases or a sample of them, says each, and returns how many are not as promised."""
    import commands
    import tiny

    finished = folder / "finished"
    made = tiny.flags(**tiny.LINEAR, checkpoint__every_steps=2, optim__ema=0.9)
    done = commands.run(["train.py", "--config=tests/defaults.py", *made, f"--workdir={finished}"], timeout=300)
    if done.returncode:
        raise SystemExit(done.stderr)
    files: list[Case] = [Case(*case) for case in bad_files.cases()]
    chosen: list[Case] = []
    for cases, most in ((invocations(), most_invocations), (files, most_files)):
        names = [case.name for case in cases]
        assert len(set(names)) == len(names), sorted({name for name in names if names.count(name) > 1})
        order = list(range(len(cases)))
        random.Random(seed).shuffle(order)
        chosen += [cases[i] for i in sorted(order[:most])]

    results = play(chosen, folder, finished, jobs)
    groups = list(dict.fromkeys(case.group for case in chosen))
    kinds = ("refused", "healed", "WRONG")
    counts = {
        (group, kind): sum(case.group == group and found.startswith(kind) for case, found in results)
        for group in groups
        for kind in kinds
    }
    lines = [(group, *(str(counts[group, kind]) for kind in kinds)) for group in groups]
    totals = [sum(counts[group, kind] for group in groups) for kind in kinds]
    table([*lines, ("all", *map(str, totals))], "what is wrong", "refused", "goes on", "not as promised")
    return totals[2]
