"""The reliability figures of docs/reliability.md, at the smallest scale."""

import re

import pytest

from benchmarks import bad_files, bad_input, reliability

SEED = "--seed=20"  # of moments that are before the end of the run
pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for name, value in {"STEPS": 12, "SAVE": 3, "EVALUATE": 6}.items():
        monkeypatch.setattr(reliability, name, value)


def test_a_killed_run_ends_in_the_same_bits(capfd):
    assert reliability.main(["kill", "--times=1", "--model=linear", "--workers=0", SEED]) == 0
    printed = capfd.readouterr().out
    assert re.search(r"^run \d+: 1 kills, the same bits$", printed, re.MULTILINE)
    assert re.search(r"^1 kills in \d+ runs; 0 not as promised$", printed, re.MULTILINE)


def test_a_run_that_lost_a_process_ends_in_the_same_bits(capfd):
    assert reliability.main(["lost", "--times=1", "--processes=2", SEED]) == 0
    assert re.search(r"^loss 1: .* all others 75 and one line$", capfd.readouterr().out, re.MULTILINE)


def test_bad_input_is_refused_in_one_line(capfd):
    assert reliability.main(["bad", "--invocations=4", "--files=4"]) == 0
    assert re.search(r"^\| all \| [5-8] \| [0-3] \| 0 \|$", capfd.readouterr().out, re.MULTILINE)


def test_there_are_enough_cases_and_each_has_its_name():
    invocations, files = [case.name for case in bad_input.invocations()], [case[1] for case in bad_files.cases()]
    assert len(set(invocations)) == len(invocations) >= 200
    assert len(set(files)) == len(files) >= 100


def test_a_difference_between_two_runs_is_found(tmp_path):
    """In a row of the log, whose times do not count."""
    for name, loss in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(f'{{"step": 1, "time": {loss}, "loss": {loss}}}\n')
    assert reliability.rows(tmp_path / "a") == [{"step": 1, "loss": 1.0}] != reliability.rows(tmp_path / "b")
