"""`train.py --sweep`: which runs there are, what is refused before any begins, what is run again, and what is shown."""

import csv
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import tiny
from commands import run as command

import configs
import errors
from training.checkpoints import json_text
from training.distributed import preemption
from training.evaluation import sweep_table
from training.run import sweep, workdir

CONFIG = "configs/quickstart.py"
RATES = "optim.learning_rate=1e-4,3e-4,1e-3"


def test_values_are_split_at_commas_outside_of_brackets():
    found = sweep.parse(
        [
            "config.optim.freeze=[a,b],[],(?!head).*,[ab].*",
            "data.mean=[0.5,0.5],(0.1,0.2)",
            "model.attention='',window",
        ]
    )
    assert found == {
        "optim.freeze": ["['a', 'b']", "[]", "(?!head).*", "[ab].*"],
        "data.mean": ["[0.5,0.5]", "(0.1,0.2)"],
        "model.attention": ["", "window"],
    }


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["seed"], "takes KEY=A,B"),
        (["seed=1,,2"], "empty value; write ''"),
        (["seed=1,2,1"], "1 is there twice"),
        (["seed=1", "config.seed=2"], "seed is swept twice"),
        (["optim.freeze=[a,b],[c"], "brackets do not match"),
        (["optim.freeze=a],b"], "brackets do not match"),
    ],
)
def test_what_is_no_sweep_is_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        sweep.parse(texts)


def names(*texts):
    return [run.name for run in sweep.combinations(sweep.parse(texts))]


def test_folders_have_readable_names_that_differ():
    assert names("optim.learning_rate=3e-4,1e-3", "seed=0,1") == [
        "learning_rate=3e-4,seed=0",
        "learning_rate=3e-4,seed=1",
        "learning_rate=1e-3,seed=0",
        "learning_rate=1e-3,seed=1",
    ]
    assert names("train.steps=90 epochs", "eval.every_steps=0", "log.every_steps=1") == [
        "steps=90_epochs,eval.every_steps=0,log.every_steps=1"
    ]
    odd = names("data.name=folder:/a/b,folder:/a-b,''", "optim.freeze=" + "x" * 200)
    assert len(set(odd)) == 3
    assert all("/" not in name and len(name) < 120 for name in odd)


def results(where, curve, config, overrides):
    """What a run leaves behind, as far as a table of it needs."""
    where.mkdir(parents=True)
    workdir.begin(where, config, overrides)
    lines = [json_text.text({"step": step, "kind": "eval/test", "top1": value}) + "\n" for step, value in curve]
    (where / "metrics.jsonl").write_text("".join(lines))


class Runs:
    """In place of `train.py`: a run is better with a larger rate, and some fail, each in its own way.

    Attributes:
      started: names, in order.
    """

    def __init__(self, failing=None):
        self.started, self.failing = [], failing or {}

    def __call__(self, arguments, asked):
        path, overrides, (place,) = configs.split_arguments(arguments)
        where = Path(place.partition("=")[2])
        self.started.append(where.name)
        code, error = self.failing.get(where.name, (0, ""))
        if code or where.exists():
            return code, error
        config = configs.load(path, overrides)
        rate = config.optim.learning_rate
        results(where, [(5, 100 * rate), (10, 90 * rate)], config, overrides)
        metrics = {"test": {"top1": 90 * rate, "loss": 1.0}}
        json_text.write(where / "summary.json", {"step": 10, "metrics": metrics, "seconds": 61.0})
        return 0, ""


def make(folder, *texts, overrides=None):
    made = sweep.Sweep(folder, CONFIG, overrides or {}, sweep.combinations(sweep.parse(texts)))
    made.check()
    return made


def test_the_same_command_skips_what_is_complete_and_tries_again_what_failed(tmp_path, capsys):
    first = Runs(failing={"learning_rate=3e-4": (errors.INPUT, "no such thing")})
    failed = make(tmp_path, RATES).run(first)
    assert failed == {"learning_rate=3e-4": (errors.INPUT, "no such thing")}
    assert len(first.started) == 3
    lines = sweep_table.write(tmp_path, failed)
    assert "failed: learning_rate=3e-4: no such thing" in lines
    second = Runs()
    assert make(tmp_path, RATES).run(second) == {}
    assert second.started == ["learning_rate=3e-4"]
    assert "sweep 1/3: learning_rate=1e-4: complete" in capsys.readouterr().out


def test_more_values_join_the_table(tmp_path):
    make(tmp_path, RATES).run(Runs())
    more = Runs()
    make(tmp_path, "optim.learning_rate=1e-3,3e-3", "seed=0,1").run(more)
    assert len(more.started) == 4
    rows = list(csv.DictReader(sweep_table.as_csv(sweep_table.read(tmp_path)).splitlines()))
    assert len(rows) == 7
    assert [row["optim.learning_rate"] for row in rows[:3]] == ["1e-4", "3e-4", "1e-3"]
    assert rows[0]["seed"] == ""
    assert rows[-1]["seed"] == "1"


def test_a_longer_run_is_not_taken_for_complete(tmp_path):
    make(tmp_path, RATES, overrides={"train.steps": "10"}).run(Runs())
    again = Runs()
    make(tmp_path, RATES, overrides={"train.steps": "20"}).run(again)
    assert len(again.started) == 3


def test_the_exit_code_says_whether_a_restart_may_help():
    assert sweep.exit_code({}) == 0
    assert sweep.exit_code({"a": (errors.INPUT, "")}) == errors.INPUT
    assert sweep.exit_code({"a": (errors.INPUT, ""), "b": (errors.MACHINE, "")}) == errors.MACHINE


@pytest.mark.parametrize(
    ("texts", "overrides", "message"),
    [
        (["optim.lerning_rate=1"], {}, "nearest: learning_rate"),
        (["optim.learning_rate=1e-3,fast"], {}, "takes a number"),
        (["optim.learning_rate=1e-3,0.001"], {}, "are the same run"),
        (["seed=1"], {"seed": "2"}, "give one of them"),
        (["task.options.label_smothing=0.1"], {}, "nearest: label_smoothing"),
        (["task.name=clasification"], {}, "nearest: classification"),
        (["model.name=nat_mini,vit_z16"], {}, "vit_z16"),
    ],
)
def test_a_mistake_in_any_run_is_said_before_the_first(tmp_path, texts, overrides, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, *texts, overrides=overrides)
    assert not list(tmp_path.iterdir())


def test_a_folder_holds_a_run_or_a_sweep(tmp_path):
    make(tmp_path / "sweep", RATES).run(Runs())
    with pytest.raises(ValueError, match="holds a sweep"):
        sweep.refuse_a_run(tmp_path / "sweep")
    with pytest.raises(ValueError, match="holds a run"):
        make(tmp_path / "sweep" / "learning_rate=1e-4", RATES)
    with pytest.raises(ValueError, match="another configuration"):
        make(tmp_path / "sweep", RATES, overrides={"optim.weight_decay": "0.5"})
    with pytest.raises(FileNotFoundError, match="nearest: sweep"):
        sweep.read(tmp_path / "sweeps")


def test_a_stop_ends_the_sweep_and_is_no_failure(tmp_path):
    runs = Runs(failing={"learning_rate=1e-4": (errors.AGAIN, "")})
    with pytest.raises(preemption.Preempted, match="the same command continues") as stop:
        make(tmp_path, RATES).run(runs)
    assert stop.value.exit_code == errors.AGAIN
    assert runs.started == ["learning_rate=1e-4"]


SLOW = """
import signal, sys, time
def leave(number, frame):
    print("error: saved", file=sys.stderr)
    sys.exit(75)
signal.signal(signal.SIGTERM, leave)
print("other words\\nerror: wrong", file=sys.stderr)
sys.stderr.flush()
open(sys.argv[1], "w").close()
time.sleep(float(sys.argv[2]))
sys.exit(int(sys.argv[3]))
"""


def test_a_process_of_its_own_passes_on_errors_and_signals(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(errors, "ROOT", tmp_path)
    (tmp_path / "train.py").write_text(SLOW)
    ready = tmp_path / "ready"
    assert sweep.in_a_process([ready, "0", "2"], lambda: None) == (2, "wrong")
    assert "other words" in capsys.readouterr().err
    ready.unlink()
    assert sweep.in_a_process([ready, "60", "0"], lambda: ready.exists() and signal.SIGTERM) == (75, "saved")
    ready.unlink()
    assert sweep.in_a_process([ready, "60", "0"], lambda: ready.exists() and signal.SIGKILL)[0] == errors.MACHINE


def test_a_signal_reaches_the_run_and_ends_the_sweep(tmp_path):
    """It ends with the run that is under way, even where that one is done a moment later."""
    runs = Runs()

    def start(arguments, asked):
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked() == signal.SIGTERM
        return runs(arguments, asked)

    with pytest.raises(preemption.Preempted):
        make(tmp_path, RATES).run(start)
    assert len(runs.started) == 1


def test_the_table_has_best_and_last_results(tmp_path):
    made = make(tmp_path, RATES)
    made.run(Runs(failing={"learning_rate=3e-4": (1, "error: ...")}))
    table = sweep_table.read(tmp_path)
    assert table.best().name == "learning_rate=1e-3"
    text = sweep_table.terminal(table).splitlines()
    assert text[0].split() == ["learning_rate", "best", "top1", "at", "step", "top1", "loss", "time", "state"]
    assert text[2].split()[-2:] == ["not", "begun"]
    assert text[3].split() == ["1e-3", "0.1000", "5", "0.0900", "1.0000", "1m01s", "complete"]
    row = list(csv.DictReader(sweep_table.as_csv(table).splitlines()))[2]
    assert (float(row["best_top1"]), row["best_step"], float(row["test/top1"])) == (pytest.approx(0.1), "5", 0.09)


def lines_of(axes):
    return [line for line in axes.get_lines() if line.get_linestyle() == "-"]


def test_the_picture_shows_means_over_seeds_on_a_logarithmic_axis(tmp_path):
    make(tmp_path, RATES, "seed=0,1").run(Runs())
    over, curves = sweep_table.figure(sweep_table.read(tmp_path)).axes
    assert over.get_xscale() == "log"
    assert over.get_xlabel() == "optim.learning_rate"
    np.testing.assert_allclose(lines_of(over)[0].get_xydata(), [[1e-4, 0.01], [3e-4, 0.03], [1e-3, 0.1]])
    assert [tick.get_text() for tick in over.get_xticklabels()] == ["1e-4", "3e-4", "1e-3"]
    assert len(curves.get_lines()) == 6
    assert len(curves.get_legend().get_texts()) == 3


@pytest.mark.parametrize(
    ("texts", "panels", "lines"),
    [
        (["optim.learning_rate=1e-4,1e-3", "model.attention='',window"], 2, 2),
        (["seed=0,1,2"], 2, 1),
        (["seed=0", "optim.b1=0.8,0.9", "optim.b2=0.9,0.99", "optim.schedule=cosine,linear"], 4, 1),
    ],
)
def test_the_picture_of_other_sweeps(tmp_path, texts, panels, lines):
    make(tmp_path, *texts).run(Runs())
    axes = sweep_table.figure(sweep_table.read(tmp_path)).axes
    assert len(axes) == panels
    assert len(lines_of(axes[0])) == lines


@pytest.mark.parametrize("content", ['{"config": "x", "overrides": {}, "runs": {}}', '{"runs": [1]}', "[]", "{"])
def test_a_record_that_cannot_be_read_is_one_line(content, tmp_path):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(ValueError, match=r"sweep\.json: cannot be read"):
        sweep_table.read(tmp_path)


def test_a_command_of_a_user(tmp_path):
    """One run that cannot work and one that is complete; the table, the code and what both commands print."""
    folder = tmp_path / "sweep"
    make(folder, "optim.learning_rate=1e-3").run(Runs())
    arguments = [f"--config={CONFIG}", f"--workdir={folder}", "--sweep", "optim.learning_rate=1e-3"]
    done = command(["train.py", *arguments])
    assert (done.returncode, done.stderr) == (0, "")
    assert "best: learning_rate=1e-3 (top1 0.1000 at step 5)" in done.stdout
    assert (folder / "sweep.png").stat().st_size > 10_000
    shown = command(["eval.py", f"--sweep={folder}"])
    assert shown.stdout == done.stdout.partition("complete\n")[2]
    for flag in ("--workdir=x", "--output=x", "--config.eval.batch_size=3"):
        refused = command(["eval.py", f"--sweep={folder}", flag])
        said = f"error: --sweep: not with {flag.partition('=')[0]}; it shows the runs of a sweep as they are\n"
        assert (refused.returncode, refused.stderr) == (2, said)
    for flag, value in (("--plan", "=v5e:1x1"), ("--dry_run", ""), ("--print_config", "")):
        refused = command(["train.py", *arguments, flag + value])
        assert (refused.returncode, refused.stderr) == (
            2,
            f"error: --sweep: not with {flag}, which is for one configuration\n",
        )
    several = command(
        ["train.py", *arguments, "--num_processes=2", "--process_id=0", "--coordinator_address=127.0.0.1:1"]
    )
    assert "--sweep: is for one process" in several.stderr


@pytest.mark.multiprocess
def test_runs_of_a_sweep_are_runs(tmp_path):
    """One that fails does not end the rest, and is said again at the end."""
    options = [f"--config.{k}={v}" for k, v in tiny.TINY.items() if k not in ("model.options", "train.steps")]
    options += [f"--config.model.options.{k}={v}" for k, v in tiny.TINY["model.options"].items() if k != "heads"]
    place = ["--config=configs/vit_digits.py", f"--workdir={tmp_path}"]
    sweeps = ["--sweep", "model.options.heads=3,2", "--config.train.steps=2"]
    done = command(["train.py", *place, *options, *sweeps])
    assert done.returncode == errors.INPUT
    (said,) = {line for line in done.stderr.splitlines() if line.startswith("error: ")}
    assert f"failed: heads=3: {said.removeprefix('error: ')}" in done.stdout
    assert [path.parent.name for path in tmp_path.glob("*/summary.json")] == ["heads=2"]
    assert sweep.read(tmp_path)["runs"] == {
        "heads=3": {"model.options.heads": "3"},
        "heads=2": {"model.options.heads": "2"},
    }
