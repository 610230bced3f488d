"""CPU seconds that making a model takes, eagerly, in a process of its own.

    python -m benchmarks.creation [--model vit_s16 swin_tiny] [--unrolled]

Prints a line of JSON for each model: its name, and seconds of user and system time, all threads together, of the
imports, of the first model and of a second one of the same kind (from another seed). Nothing is taken from a
compilation cache on disk, and other work on the machine changes little: it is no time that passed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("vit_s16", "swin_tiny", "maxvit_tiny", "volo_d1", "halonet26t")


def cpu_seconds() -> float:
    """User and system time of this process since it began."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(name: str, unrolled: bool) -> dict[str, float | str]:
    """The line of one model, in this process, which has imported nothing of what is measured."""
    marks = [cpu_seconds()]
    import jax
    from flax import nnx

    import models

    marks.append(cpu_seconds())
    options = {"scan": False} if unrolled else {}
    for seed in (0, 1):
        jax.block_until_ready(models.split(models.create(name, rngs=nnx.Rngs(seed), **options))[1:])
        marks.append(cpu_seconds())
    spent = [round(after - before, 2) for before, after in itertools.pairwise(marks)]
    return {"model": name, **dict(zip(("imports", "first", "second"), spent, strict=True))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=MODELS)
    parser.add_argument("--unrolled", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.model[0], options.unrolled)))
        return
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    for name in options.model:
        command = [sys.executable, "-m", "benchmarks.creation", "--here", "--model", name]
        command += ["--unrolled"] if options.unrolled else []
        subprocess.run(command, cwd=ROOT, env=environment, check=True)


if __name__ == "__main__":
    main()
