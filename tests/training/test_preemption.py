"""Signals between steps: of one process, and of one of several."""

import os
import signal

import pytest

from training.distributed import preemption, processes
from training.distributed.preemption import Preempted, Signals


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


def test_the_second_ctrl_c_interrupts():
    with Signals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with Signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_exit_codes():
    assert Preempted("", signal.SIGTERM).exit_code == preemption.EXIT_CODE == 75
    assert Preempted("", signal.SIGINT).exit_code == 130
