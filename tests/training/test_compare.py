"""Runs side by side, from what their evaluations stored."""

import html
import json
import re

import pytest

import eval as eval_command
from training.run import command

STORED = {"model": "vit_mu16", "step": 20, "weights": "ema", "config_hash": "0", "set": "test", "commit": "abc"}


def run(*arguments):
    return command.guarded(eval_command.main, [str(argument) for argument in arguments])


@pytest.fixture
def runs(tmp_path):
    """Two evaluated runs with a training each."""
    for name, top1, rate in (("a", 0.5, 1e-3), ("b", 0.75, 1e-2)):
        (tmp_path / name / "eval").mkdir(parents=True)
        stored = {**STORED, "results": {"top1": top1, "loss": 1.0, "confusion": [[1]]}, "config": {"seed": 0}}
        stored["config"]["optim.learning_rate"] = rate
        (tmp_path / name / "eval" / "test.json").write_text(json.dumps(stored))
        rows = [{"step": step, "kind": "train", "loss": 2 / step, "learning_rate": rate} for step in (1, 2)]
        rows.append({"step": 2, "kind": "eval/test", "loss": 1.0, "top1": top1})
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_two_runs_side_by_side(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    (runs / "a" / "eval" / "other.json").write_text('{"x": 1}')
    (runs / "a" / "eval" / "cut.json").write_text("{")
    assert run("--compare=a,b", "--output=out") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["test", "a", "b", "difference"],
        ["top1", "0.5000", "0.7500", "+0.2500"],
        ["loss", "1.0000", "1.0000", "+0.0000"],
        ["out/compare.html"],
    ]
    text = (runs / "out" / "compare.html").read_text()
    assert re.findall(r'<tr class="changed"><td>(.*?)</td>', text) == ["optim.learning_rate"]
    curves = [json.loads(found) for found in re.findall(r'<script type="application/json">(.*?)</script>', text)]
    series = {curve["label"]: {one["name"]: one["points"] for one in curve["series"]} for curve in curves}
    assert series["loss"]["a train"] == [[1, 2.0], [2, 1.0]]
    assert series["loss"]["b test"] == [[2, 1.0]]
    assert set(series["learning rate"]) == {"a train", "b train"}
    assert "+0.2500" in html.unescape(text)


def test_what_one_run_lacks_is_left_open(runs, capsys):
    stored = json.loads((runs / "b" / "eval" / "test.json").read_text())
    del stored["results"]["loss"]
    (runs / "b" / "eval" / "test.json").write_text(json.dumps({**stored, "set": "other"}))
    assert run(f"--compare={runs / 'a'},{runs / 'b'},{runs / 'b' / 'eval'}") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["top1", "0.5000", "–", "–"]
    assert lines[5].split() == ["top1", "–", "0.7500", "0.7500"]
    assert (runs / "a" / "eval" / "compare.html").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--compare=a"], "--compare=a: takes two or more different folders, such as runs/a,runs/b"),
        (["--compare=a,a"], "--compare=a,a: takes two or more different folders, such as runs/a,runs/b"),
        (["--compare=a,bb"], "--compare: no folder bb; nearest: b"),
        (["--compare=a,empty"], "--compare: empty has no results; evaluate it first (eval.py --workdir=empty)"),
        (["--compare=a,b", "--step=3"], "--compare: not with --step; it shows stored results as they are"),
        (
            ["--compare=a,b", "--config.seed=1"],
            "--compare: not with --config.seed; it shows stored results as they are",
        ),
    ],
)
def test_bad_input_is_one_line(runs, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(runs)
    (runs / "empty").mkdir()
    assert run(*arguments) == 2
    assert capsys.readouterr().err.strip() == f"error: {said}"
    assert not list(runs.rglob("*.html"))
