"""Where the time of a run went, over its attempts; the FLOPs of a step; and what the terminal shows meanwhile."""

import io
import json
import threading
import time

import pytest
import tiny

import models
from training.plans import chips
from training.run import goodput, loop
from training.run import terminal as shown
from training.run.run import prepare
from training.run.terminal import Terminal


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = [100.0]
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def attempt(folder, step, clock):
    """4 s to start, 2 s of compilation, then steps."""
    ledger = goodput.Ledger(folder, step, goodput.time.perf_counter())
    clock(4)
    with ledger.spending("compilation"):
        clock(2)
    ledger.enter(goodput.STEPS)
    return ledger


def test_time_runs_for_one_thing_at_a_time(tmp_path, clock):
    ledger = attempt(tmp_path, 0, clock)
    clock(10)
    with ledger.spending("evaluation"):
        clock(3)
        with ledger.spending("saving"):
            clock(1)
    ledger.move(2.0, goodput.STEPS, "data")
    ledger.move(1.0, goodput.STEPS, "skipped")
    assert ledger.result() == {
        "share": 0.35,
        "seconds": {
            "steps": 7.0,
            "start": 4.0,
            "compilation": 2.0,
            "data": 2.0,
            "evaluation": 3.0,
            "saving": 1.0,
            "skipped": 1.0,
        },
        "attempts": 1,
    }
    shares = ledger.shares()
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["lost_data"] == pytest.approx(0.1)
    assert "lost_redone" not in shares
    assert str(ledger).startswith("goodput 35.0% of 20s; lost: start 20.0%, evaluation 15.0%, ")


def test_steps_that_have_to_be_taken_again_are_lost(tmp_path, clock):
    ledger = attempt(tmp_path, 0, clock)
    clock(10)
    ledger.note(10, saved=True)
    clock(5)
    ledger.note(15)  # and killed
    again = attempt(tmp_path, 10, clock)
    clock(9)
    assert again.seconds["redone"] == 5
    assert again.result()["seconds"] == {"steps": 19.0, "start": 8.0, "compilation": 4.0, "redone": 5.0}
    assert again.attempts == 2
    assert "in 2 attempts" in str(again)
    again.note(19)
    # Of a save that nobody noted: in proportion. And from the very beginning.
    assert goodput.Ledger(tmp_path, 18, 0.0).seconds["steps"] == pytest.approx(19 * 18 / 19)
    assert goodput.Ledger(tmp_path, 0, 0.0).seconds["steps"] == 0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"seconds": 5}', '{"seconds": {}, "steps_at_save": {"x": 1}}'])
def test_a_damaged_file_stops_nothing(text, tmp_path):
    (tmp_path / "goodput.json").write_text(text)
    ledger = goodput.Ledger(tmp_path, 5, 0.0)
    assert ledger.attempts == 1
    assert not sum(ledger.seconds.values())


def test_a_run_says_where_its_time_went(tmp_path):
    result = loop.train(tiny.config(train__steps=6, log__every_steps=2), tmp_path, terminal=tiny.quiet())
    assert result["goodput"] == json.loads((tmp_path / "summary.json").read_text())["goodput"]
    seconds = result["goodput"]["seconds"]
    assert {"steps", "start", "compilation", "evaluation", "saving"} <= seconds.keys()
    assert sum(seconds.values()) == pytest.approx(result["seconds"], abs=0.1)
    assert seconds["compilation"] > seconds["steps"]
    for row in tiny.rows(tmp_path):
        assert 0 < row["goodput"] < 1
        assert "mfu" not in row  # nobody knows the peak of this CPU


def flops(**overrides):
    run = prepare(tiny.config(data__batch_size=8, **overrides))
    traced = run.step.trace(run.template, run.task.batch_spec(8, train=True), run.partner_arrays)
    forward = 2 * models.summarize(run.model, (8, 16, 16, 3)).total.multiply_adds
    utilization = goodput.Utilization(traced, lambda kind: 1e9)
    assert utilization.of(2, 4.0) == {"mfu": 2 * utilization.flops / (4.0 * utilization.most)}
    assert goodput.Utilization(traced, lambda kind: None).of(2, 4.0) == {}
    return utilization.flops / forward


def test_the_flops_of_a_step_are_those_of_the_model():
    """Three forward passes but for the gradient of the images; in a loop as unrolled, with rematerialization or not."""
    plain = flops()
    assert 2.5 < plain < 3
    assert flops(model__scan=True) == pytest.approx(plain)
    assert flops(model__remat="full") == pytest.approx(plain)
    assert flops(optim__accumulate=2) == pytest.approx(plain)


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        *(("TPU v5 lite", 197), ("TPU v5p", 459), ("TPU v5", 459), ("TPU v6 lite", 918), ("TPU v4", 275)),
        *(("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H200", 989.4), ("NVIDIA A100-SXM4-40GB", 312), ("cpu", None)),
        *(("NVIDIA H100 PCIe", 756), ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("TPU7x", 1153.5), ("a new one", None)),
    ],
)
def test_peaks(kind, tera):
    assert chips.peak(kind) == (tera and pytest.approx(tera * 1e12))


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self):
        return True


def test_what_takes_time_is_shown_on_a_terminal_and_leaves_nothing():
    screen = Screen()
    terminal = Terminal(screen)
    with terminal.busy("evaluating test"):
        with terminal.busy("compiling the step"):
            pass
        terminal.part("evaluating test", 3, 4)
    terminal.say("done")
    said = screen.getvalue()
    assert "compiling the step ... 0s" in said
    assert "evaluating test ... 0s" in said
    assert "[###############.....] evaluating test 3/4" in said
    assert said.endswith("\r\x1b[K\rdone\n")


def test_a_pipe_is_told_only_of_what_takes_long(monkeypatch):
    """By a thread of its own: what takes long holds this one."""
    monkeypatch.setattr(shown, "QUIET_SECONDS", 0.2)
    monkeypatch.setattr(shown, "RENEWED_SECONDS", 0.01)
    pipe = io.StringIO()
    terminal = Terminal(pipe)
    terminal.say("begun")
    terminal.part("evaluating test", 3, 4)
    with terminal.busy("reading a little"):
        pass
    with terminal.busy("evaluating test"), terminal.busy("compiling the step"):
        time.sleep(0.5)
    assert pipe.getvalue() == "begun\ncompiling the step ...\n"
    assert not any(thread.name == "terminal" for thread in threading.enumerate())


def test_a_process_that_shows_nothing_shows_nothing(monkeypatch):
    monkeypatch.setattr(shown, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(shown, "RENEWED_SECONDS", 0.01)
    pipe = io.StringIO()
    with Terminal(pipe, quiet=True).busy("compiling the step"):
        time.sleep(0.05)
    assert pipe.getvalue() == ""
