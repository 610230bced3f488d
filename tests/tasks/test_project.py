"""Seven unlike tasks of a project outside this repository (tests/project), each by the commands that a user types and
by configuration alone: nothing in `training/` knows of any of them.
"""

import csv
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from commands import run
from PIL import Image
from processes_job import Job

PROJECT = Path(__file__).resolve().parents[1] / "project"
ENVIRONMENT = {"PYTHONPATH": str(PROJECT)}
TRAINED = ("pairs", "towers", "diffusion", "words", "scanpaths", "voxels")
pytestmark = pytest.mark.multiprocess


def command(script, *arguments, code=0):
    done = run([script, *map(str, arguments)], ENVIRONMENT, folder=PROJECT)
    assert done.returncode == code, done.stderr
    return done


def experiment(name):
    return f"--config={PROJECT / 'experiment.py'}:{name}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of an experiment by name, trained to its end when it is first asked for."""
    folder, cache = tmp_path_factory.mktemp("project"), f"--config.log.cache_directory={tiny.CACHE}"

    def workdir(name):
        if not (folder / name).exists():
            command("train.py", experiment(name), f"--workdir={folder / name}", cache)
        return folder / name

    return workdir


def results(folder, label="test"):
    return json.loads((folder / "eval" / f"{label}.json").read_text())["results"]


# What a model that learned nothing, or an evaluation of other examples, would not reach.
REACHED = {
    "pairs": lambda found: found["psnr"] > 20.9,
    "towers": lambda found: found["recall"] > 0.9,
    "diffusion": lambda found: 0.75 < found["contrast"] <= 1,
    "words": lambda found: found["exact"] > 0.8,
    "scanpaths": lambda found: found["path/distance"] < 1 and found["path/length"] > 0.8,
    "voxels": lambda found: found["correlation/mean"] > 0.9 and abs(found["correlation/voxels"][-1]) < 0.5,
}


@pytest.mark.parametrize("name", TRAINED)
def test_it_trains_and_is_evaluated(name, trained):
    workdir = trained(name)
    command("eval.py", f"--workdir={workdir}")
    found = results(workdir)
    assert REACHED[name](found), found
    summary = json.loads((workdir / "summary.json").read_text())
    for metric, value in summary["metrics"]["test"].items():
        assert found[metric] == pytest.approx(value, rel=1e-4, abs=1e-5), metric
    losses = [row["loss"] for row in tiny.rows(workdir)]
    assert losses[-1] < losses[0]
    if name in ("pairs", "diffusion"):  # their pictures of samples
        assert (workdir / "eval" / "report.html").read_text().count("<img") >= 2


def test_an_evaluation_may_have_options_and_a_period_of_its_own(trained):
    whole, tiled = results(trained("pairs")), results(trained("pairs"), "tiled")
    assert 0 < abs(whole["psnr"] - tiled["psnr"]) < 1  # tiles have borders
    rows = [json.loads(line) for line in (trained("pairs") / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "eval/test"] == [40, 80]
    assert [row["step"] for row in rows if row["kind"] == "eval/tiled"] == [80]


def test_neighbours_see_one_set_and_are_measured_on_another(tmp_path):
    command("eval.py", experiment("neighbours"), f"--output={tmp_path}")
    five, one = (json.loads((tmp_path / f"{label}.json").read_text()) for label in ("test_50", "one"))
    assert five["results"]["accuracy"] > 0.9
    assert 0.7 < one["results"]["accuracy"] < 1
    assert five["examples"] == 50
    said = command("eval.py", experiment("neighbours"), "--config.eval.fit=", code=2).stderr
    assert "config.eval.fit=@train" in said


def test_predictions_are_what_a_task_gives(trained, tmp_path):
    for index in range(3):
        Image.new("RGB", (16, 12), (60 * index, 0, 0)).save(tmp_path / f"{index}.png")
    outputs = {name: tmp_path / "out" / name for name in ("pairs", "scanpaths", "voxels")}
    command("eval.py", f"--workdir={trained('pairs')}", f"--predict={tmp_path}", f"--output={outputs['pairs']}")
    rows = list(csv.DictReader((outputs["pairs"] / "predictions.csv").open()))
    assert [row["file"] for row in rows] == ["0.png", "1.png", "2.png"]
    assert [row["restored"] for row in rows] == [f"predictions/{index}_restored.png" for index in range(3)]
    assert np.asarray(Image.open(outputs["pairs"] / rows[2]["restored"])).shape == (12, 16, 3)
    for name in ("scanpaths", "voxels"):
        command("eval.py", f"--workdir={trained(name)}", "--predict=@test", f"--output={outputs[name]}")
    lines = [json.loads(line) for line in (outputs["scanpaths"] / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert {len(line["points"]) for line in lines} <= {1, 2, 3, 4}
    (first, *_) = (outputs["voxels"] / "predictions.jsonl").read_text().splitlines()
    assert len(json.loads(first)["voxels"]) == 6


@pytest.mark.parametrize(("name", "array"), [("diffusion", "sample"), ("words", "row")])
def test_samples_come_from_the_compiled_program(name, array, trained, tmp_path):
    command("eval.py", f"--workdir={trained(name)}", "--generate=5", f"--output={tmp_path}")
    made = np.load(tmp_path / "generated.npz")
    assert len(made[array]) == 5
    if name == "words":
        rows = made[array]
        assert ((rows[:, 2:] - rows[:, 1:-1]) % 10 == (rows[:, 1:2] - rows[:, :1]) % 10).mean() > 0.8


@pytest.mark.parametrize("name", ["towers", "words", "voxels"])
def test_it_is_exported_with_all_its_inputs(name, trained, tmp_path):
    command("eval.py", f"--workdir={trained(name)}", f"--export={tmp_path}")
    about = json.loads((tmp_path / "export.json").read_text())
    function = jax.export.deserialize((tmp_path / "inference.stablehlo").read_bytes())
    if name == "towers":
        assert set(about["inputs"]) == {"image", "text"}
        inputs = {field: eval(text, {"numpy": np}) for field, text in about["check"]["inputs"].items()}
        found, expected = function.call(inputs), about["check"]["outputs"]
    else:
        assert ("axes" in about["input"]) == (name == "voxels")  # of images
        found, expected = function.call(eval(about["check"]["input"], {"numpy": np})), about["check"]["output"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


@pytest.mark.plan
@pytest.mark.parametrize("name", TRAINED)
def test_it_is_planned(name):
    said = command("train.py", experiment(name), "--plan=v5e:2x2", "--no_batch_search").stdout
    assert "as compiled" in said


@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_do_as_one(name, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    short = ["--config.train.steps=4", "--config.log.every_steps=1", "--config.data.batch_size=8"]
    short += ["--config.eval.batch_size=4", f"--config.log.cache_directory={tiny.CACHE}"]
    Job(experiment(name), *short, f"--workdir={tmp_path / 'two'}", processes=2).succeed()
    command("train.py", experiment(name), *short, f"--workdir={tmp_path / 'one'}")
    one, two = (tiny.rows(tmp_path / which) for which in ("one", "two"))
    for mine, theirs in zip(one, two, strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-4)
    summaries = [json.loads((tmp_path / which / "summary.json").read_text()) for which in ("one", "two")]
    for metric, value in summaries[0]["metrics"]["test"].items():
        assert summaries[1]["metrics"]["test"][metric] == pytest.approx(value, rel=1e-3, abs=1e-4), metric
