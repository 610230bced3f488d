"""`processes_fault.py FAULT ARGUMENTS`: train.py with a fault, which a test has to notice."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from training import command, processes


def same_share():
    """Every process reads what process 0 should read."""
    from training import mesh

    mesh.batch_rows = lambda sharding, size: list(range(size // 2))


def impatient():
    """A shared folder has to show a new file at once."""
    processes.SHARED_SECONDS = 0.5


def main(fault, *arguments):
    if fault == "same_share":
        start = command.start_jax

        def start_with_fault(*given):
            started = start(*given)
            same_share()
            return started

        command.start_jax = start_with_fault
    else:
        impatient()
    return command.guarded(train.main, list(arguments))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
