"""Worker processes: nothing outlives a killed parent, a killed worker is named, and nobody has to parse flags."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = Path("/dev/shm")
pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.slow,
    pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="looks at /proc and /dev/shm"),
]

SCRIPT = """
import multiprocessing, os, sys, time
import data

def main():
    source = data.open_source("synthetic:size=96", "train")
    stream = data.train_stream(source, transforms="normalize", batch_size=96, seed=0, workers=2, prefetch=4)
    next(stream)
    print(*[process.pid for process in multiprocessing.active_children()], flush=True)
    {body}

if __name__ == "__main__":
    main()
"""


def start(tmp_path, body):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(body=body))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    run = subprocess.Popen([sys.executable, str(script)], env=environment, text=True, **pipes)
    return run, [int(word) for word in run.stdout.readline().split()]


def segments_of(workers, parent):
    """Shared memory and semaphores that a process of this family has in use: its open and mapped files."""
    names = set()
    for pid in (parent, *workers):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            _, found, name = line.partition(f"{SHARED_MEMORY}/")
            if found:
                names.add(name.removesuffix(" (deleted)"))
    return names


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("pause", [0.0, 0.3])
def test_killing_the_parent_leaves_no_worker_and_no_shared_memory(tmp_path, pause):
    before = set(os.listdir(SHARED_MEMORY))
    run, workers = start(tmp_path, "while True: time.sleep(0.02); next(stream)")
    assert len(workers) == 2
    time.sleep(pause)
    used = segments_of(workers, run.pid)
    assert used
    run.kill()
    run.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and (any(map(alive, workers)) or used & set(os.listdir(SHARED_MEMORY))):
        time.sleep(0.1)
    assert not [pid for pid in workers if alive(pid)]
    assert not used & set(os.listdir(SHARED_MEMORY))
    # Segments made after the look above would be nobody's; other tests may run beside this one, so only ask when alone.
    if "PYTEST_XDIST_WORKER" not in os.environ:
        assert not set(os.listdir(SHARED_MEMORY)) - before
    for pipe in (run.stdin, run.stdout, run.stderr):
        pipe.close()


def test_a_killed_worker_is_named_and_nothing_hangs(tmp_path):
    body = """
    import signal
    victim = multiprocessing.active_children()[0].pid
    os.kill(victim, signal.SIGKILL)
    try:
        while True:
            next(stream)
    except ChildProcessError as error:  # as which Python knows it
        print(victim, error)
    stream.close()
    """
    run, _ = start(tmp_path, body.strip())
    output, _ = run.communicate(timeout=60)
    victim, _, message = output.strip().partition(" ")
    assert message == f"data worker process {victim} was killed by signal 9 (SIGKILL; out of memory?)"
    assert run.returncode == 0


def test_workers_leave_signals_to_their_parent_and_end_with_it(tmp_path):
    """SIGTERM or Ctrl-C to the whole group must not cost the parent its batches, nor show a worker's traceback."""
    body = """
    sys.stdin.readline()
    for _ in range(20):
        next(stream)
    print("served")
    """
    run, workers = start(tmp_path, body.strip())
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    time.sleep(0.3)
    output, errors = run.communicate("go\n", timeout=60)  # and the script ends without closing its stream
    assert output.strip() == "served"
    assert run.returncode == 0
    assert "Traceback" not in errors
    assert not [pid for pid in workers if alive(pid)]


def test_errors_and_counts_cross_processes(tmp_path):
    body = """
    import numpy as np
    labels = np.arange(64) % 11
    odd = data.ArraySource({"label": labels}, fields={"label": "label"}, name="odd", num_classes=10)
    options = dict(transforms="", batch_size=64, seed=0, workers=1)
    with data.train_stream(odd, **options, on_error="replace") as replaced:
        next(replaced)
        print(replaced.stats.replaced, (labels == 10).sum())
    try:
        next(data.train_stream(odd, **options))
    except data.ExampleError as error:
        print(error)
    stream.close()
    """
    run, _ = start(tmp_path, body.strip())
    output, _ = run.communicate(timeout=90)
    counts, message = output.strip().splitlines()
    assert len(set(counts.split())) == 1
    assert message.startswith("label 10 of example ")
    assert run.returncode == 0
