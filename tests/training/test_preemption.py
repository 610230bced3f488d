"""Signals between steps: of one process, and of one of several."""

import contextlib
import os
import signal
import threading

import jax
import pytest

from training.distributed import preemption, processes
from training.distributed.preemption import Preempted, Signals
from training.run import compiling


class Others:
    """In the place of the lifeline: all agree to stop after the next step but one."""

    def __init__(self):
        self.stop_after = None
        self.step = 0

    def request_stop(self):
        self.stop_after = self.step + 2

    def stops_after(self, step):
        self.step = step
        return self.stop_after is not None and step >= self.stop_after


def test_one_process_stops_after_the_step():
    with Signals() as signals:
        assert signals.after(1) is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.after(2) == signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_of_several_stops_when_all_do(number, monkeypatch):
    monkeypatch.setattr(processes, "_lifeline", Others())
    with Signals() as signals:
        assert signals.after(1) is None
        os.kill(os.getpid(), number)
        assert signals.after(2) is None
        assert signals.after(3) == number


def test_one_of_several_stops_because_of_another(monkeypatch):
    others = Others()
    monkeypatch.setattr(processes, "_lifeline", others)
    with Signals() as signals:
        others.request_stop()
        assert [signals.after(step) for step in (1, 2)] == [None, signal.SIGTERM]


def test_the_second_ctrl_c_ends_the_process_whatever_it_does():
    before = signal.getsignal(signal.SIGINT)
    with Signals():
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == before


def served(signals, said, number=None):
    """A part of a program in which a signal comes, or has come."""
    with signals.at_once(said):
        if number:
            os.kill(os.getpid(), number)
        raise AssertionError("the signal was not served")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_where_nothing_is_lost_a_signal_is_served_at_once(number):
    with Signals() as signals:
        with pytest.raises(Preempted, match=f"^signal {number:d} while it waits$") as stop:
            served(signals, "while it waits", number)
        assert not stop.value.together
        # It is remembered: what else could be left at once is not begun.
        with pytest.raises(Preempted):
            served(signals, "in the next one")
        assert signals.after(1) == number


def test_what_is_being_finished_is_finished():
    written = []
    with Signals() as signals, signals.at_once("before that"):
        with preemption.finishing():
            os.kill(os.getpid(), signal.SIGTERM)
            written.append("all files")
        assert written


def test_no_handler_of_failures_takes_a_signal_for_one():
    with pytest.raises(Preempted), Signals() as signals, signals.at_once("now"), contextlib.suppress(Exception):
        os.kill(os.getpid(), signal.SIGTERM)


def test_work_that_holds_its_thread_is_left_by_a_signal():
    """As a compilation does, which is C++; here it waits for what comes only after the signal."""
    release = threading.Event()

    alarm = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted), Signals() as signals, signals.at_once("while it compiles"):  # noqa: PT012
        alarm.start()
        preemption.interruptible(release.wait)
    assert preemption.still_working()
    release.set()


def test_work_gives_what_it_gives():
    assert preemption.interruptible(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        preemption.interruptible(lambda: 1 // 0)


def test_what_was_compiled_ahead_is_not_compiled_again():
    compiled = []

    def note(name, _, **about):
        if "backend_compile" in name:
            compiled.append(name)

    jitted = jax.jit(lambda x: x * 3 + 1, donate_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
    x = jax.numpy.arange(5.0)
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        traced = compiling.ahead(jitted, x, what="it")
        assert len(compiled) == 1
        jitted(x)
        assert len(compiled) == 1
        assert "mul" in str(traced.jaxpr)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with Signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
