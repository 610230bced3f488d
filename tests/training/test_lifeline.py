"""Processes that meet, lose each other and agree to stop, without JAX: real ones, on the loopback device."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.multiprocess

PEER = Path(__file__).resolve().parents[1] / "peer.py"
AGAIN = "start the same command again, with fewer processes if need be: it continues from the newest checkpoint"


def free_port():
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return chosen.getsockname()[1]


class Peer:
    def __init__(self, port, processes, process, timeout=20.0, lost_after=20.0, facts=()):
        facts = json.dumps(dict(facts))
        arguments = map(str, (f"127.0.0.1:{port}", processes, process, timeout, lost_after, facts))
        self.process = subprocess.Popen(
            [sys.executable, str(PEER), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def say(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self):
        return self.process.stdout.readline().strip()

    def end(self, timeout=20):
        """Exit code and what it printed since."""
        try:
            self.process.wait(timeout)  # with stdin open: a peer ends for a reason of its own
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        out, errors = self.process.communicate()
        return self.process.returncode, (out + errors).strip()


@pytest.fixture
def start():
    """Starts the processes of one run: all of them, or those that are named."""
    started = []

    def run(processes, which=None, port=None, **options):
        port = port or free_port()
        peers = [Peer(port, processes, i, **options) for i in (range(processes) if which is None else which)]
        started.extend(peers)
        return peers

    yield run
    for peer in started:
        peer.process.kill()
        peer.process.communicate()


def met(peers):
    assert [peer.hear() for peer in peers] == ["met"] * len(peers)
    return peers


def test_processes_meet_and_part(start):
    peers = met(start(3))
    for peer in reversed(peers):
        assert peer.process.poll() is None  # nobody leaves before all are done
        peer.say("close")
    assert [peer.end() for peer in peers] == [(0, "")] * 3


def test_what_jax_says_is_relayed(start):
    peers = met(start(2))
    peers[0].say("serve")
    peers[1].say("ask")
    assert peers[1].hear() == "hello"


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_process_is_named_by_all_others_at_once(start, victim):
    peers = met(start(3))
    peers[victim].process.kill()
    begin = time.monotonic()
    for i, peer in enumerate(peers):
        code, said = peer.end()
        if i != victim:
            assert code == 75
            assert re.fullmatch(
                rf"process {victim} of 3 on \S+ was lost \(its connection broke: it died or was killed\); {AGAIN}", said
            )
    assert time.monotonic() - begin < 3


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_stands_still_is_lost_after_a_while(start, victim):
    peers = met(start(3, lost_after=1))
    peers[victim].process.send_signal(signal.SIGSTOP)
    others = [peer for i, peer in enumerate(peers) if i != victim]
    for peer in others:
        code, said = peer.end()
        assert code == 75
        assert said.startswith(f"process {victim} of 3 on ")
        assert f"no sign of life for 1 s); {AGAIN}" in said
    peers[victim].process.send_signal(signal.SIGCONT)
    assert peers[victim].end()[0] == 75


def test_all_standing_still_together_is_no_loss(start):
    """A machine that was suspended, or swapped: nobody could hear, so nobody is missing."""
    peers = met(start(2, lost_after=1))
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for peer in peers:
            peer.process.send_signal(number)
        time.sleep(1.5)
    for peer in peers:
        peer.say("close")
    assert [peer.end() for peer in peers] == [(0, "")] * 2


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_ends_the_others_with_its_reason(start, failing):
    peers = met(start(3))
    peers[failing].say("fail")
    for i, peer in enumerate(peers):
        code, said = peer.end()
        assert code == 2
        others = "" if i == failing else rf"process {failing} of 3 on \S+ ended: "
        assert re.fullmatch(others + "error: no such thing", said)


def test_two_failures_at_once_are_one_line_each(start):
    peers = met(start(2))
    for peer in peers:
        peer.say("fail")
    for peer in peers:
        code, said = peer.end()
        assert code == 2
        assert re.fullmatch(r"(process \d of 2 on \S+ ended: )?error: no such thing", said)


def test_who_does_not_come_is_named(start):
    peers = start(4, which=(0, 2), timeout=1)
    for peer in peers:
        code, said = peer.end()
        assert code == 2
        line = r"ProcessMissing: 2 of 4 processes did not come to 127.0.0.1:\d+ within 1 s: 1, 3 \(a test\)"
        assert re.fullmatch(line, said)


def test_a_coordinator_that_cannot_be_reached(start):
    (peer,) = start(2, which=[1], timeout=0.5)
    code, said = peer.end()
    assert code == 2
    line = r"ProcessMissing: process 0 cannot be reached at 127.0.0.1:\d+ within 0.5 s: Connection refused \(a test\)"
    assert re.fullmatch(line, said)


def test_a_port_that_is_taken(start):
    with socket.create_server(("", 0)) as taken:
        (peer,) = start(2, which=[0], port=taken.getsockname()[1])
        code, said = peer.end()
    assert code == 2
    assert re.fullmatch(r"ProcessMissing: port \d+ of 127.0.0.1:\d+ cannot be used here: Address already in use", said)


def test_processes_that_disagree_are_refused_and_the_others_wait(start):
    port = free_port()
    first, second = start(3, which=(0, 1), port=port)
    time.sleep(1)  # the second of that number is to come later
    for process, processes, line in (
        (1, 3, r"BadInput: --process_id=1: there is such a process already, on \S+"),
        (0, 3, r"ProcessMissing: port .*"),
        (2, 4, r"BadInput: --num_processes=4: process 0 was started with --num_processes=3"),
    ):
        (wrong,) = start(processes, which=[process], port=port)
        code, said = wrong.end()
        assert code == 2
        assert re.fullmatch(line, said)
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert stranger.recv(100) == b""
    met([first, second, *start(3, which=[2], port=port)])


def test_one_that_has_other_facts_ends_all(start):
    """Those who came before it and those who come after it hear of it too."""
    port = free_port()
    facts = {"the code": "a", "config.seed": "0", "the version of jax": "1"}
    peers = start(4, which=(0, 1), port=port, facts=facts)
    time.sleep(0.5)
    peers += start(4, which=(2,), port=port, facts={**facts, "the code": "b", "config.seed": "1"})
    for peer in peers:
        code, said = peer.end()
        assert code == 2
        assert re.fullmatch(
            r"BadInput: process 2 of 4 on \S+ differs from process 0: the code is b for a; config.seed is 1 "
            r"for 0; start all processes with the same command, code and packages",
            said,
        )


def test_one_that_left_before_the_start_may_come_again(start):
    port = free_port()
    (first,) = start(3, which=[0], port=port)
    (early,) = start(3, which=[1], port=port)
    time.sleep(1)
    early.process.kill()
    early.process.wait()
    met([first, *start(3, which=(1, 2), port=port)])


@pytest.mark.parametrize("stopped", [0, 1])
def test_all_stop_after_the_same_step(start, stopped):
    peers = met(start(3))
    for i, peer in enumerate(peers):
        peer.say(f"steps 100 {150 if i == stopped else 0}")
    steps = {int(peer.hear()) for peer in peers}
    assert len(steps) == 1
    # The step in which the signal comes may be the last: it counts as taken only after that.
    assert 150 <= steps.pop() < 100_000


def test_a_stop_before_the_first_step_is_not_forgotten(start):
    peers = met(start(2))
    peers[1].say("stop")
    time.sleep(0.5)
    for peer in peers:
        peer.say("steps 100 0")
    assert [peer.hear() for peer in peers] == ["100", "100"]
