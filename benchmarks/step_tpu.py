"""A whole train step on one TPU, by the TPU's own compiler on a machine that has none: where its cycles go.

    python -m benchmarks.step_tpu configs/vit_b16_imagenet.py [KEY=VALUE ...] [--chip=v5e] [--top=20]

Keys are those of the configuration, such as `data.batch_size=64 model.scan=False`. Needs the extra `plan`. XLA's own
operations count by the compiler's estimates, kernels (Pallas) by their schedules (`benchmarks/tpu_cycles.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import tpu_cycles
from training.plans import hlo
from training.plans.chips import GIB

_FACTS = "facts.json"


def measure(config: str, changes: dict[str, str], chip: str = "v5e") -> tuple[tpu_cycles.Report, dict[str, Any]]:
    """Compiles the step of a configuration and counts; the facts are `memory_bytes`, `temporaries`, `seconds`.

    Raises:
      DoesNotCompile: the configuration cannot be compiled for the chip.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        command = [sys.executable, "-m", "benchmarks.step_tpu", f"--chip={chip}", f"--compile_into={scratch}", config]
        command += [f"{key}={value}" for key, value in changes.items()]
        environment = tpu_cycles.environment(folder)
        done = subprocess.run(command, env=environment, cwd=tpu_cycles.ROOT, capture_output=True, text=True)
        if done.returncode:
            raise tpu_cycles.DoesNotCompile(f"{config} for {chip}: {tpu_cycles.last_words(done.stderr)}")
        return tpu_cycles.read(folder, chip), json.loads((folder / _FACTS).read_text())


def dearest(report: tpu_cycles.Report, count: int) -> list[str]:
    """Lines for XLA's dearest operations: million cycles, what they give, and what they belong to."""
    module = hlo.parse(report.text)
    found = {name: one for part in module.computations.values() for name, one in part.instructions.items()}
    lines = []
    for name, cycles in sorted(report.operations.items(), key=lambda item: -item[1])[:count]:
        shapes = " ".join(str(buffer.dims) for buffer in found[name].outputs[:3])
        where = re.search(r'op_name="([^"]*)"', found[name].attributes)
        lines.append(f"{cycles / 1e6:8.2f}  {shapes:60.60}  {where[1][-70:] if where else name}")
    return lines


def _compile(folder: Path, config: str, changes: dict[str, str], chip: str) -> None:
    import configs
    from training.plans import chips, plan

    made = plan.make(
        configs.load(config, changes), chips.parse(tpu_cycles.TOPOLOGIES[chip]), keep=folder / tpu_cycles.MODULE
    )
    facts = {
        "memory_bytes": made.cost.memory_bytes,
        "temporaries": made.temporaries,
        "forward_flops": made.forward_flops,
        "seconds": made.compile_seconds,
    }
    (folder / _FACTS).write_text(json.dumps(facts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--chip", default="v5e", choices=tpu_cycles.TOPOLOGIES)
    parser.add_argument("--top", type=int, default=0, help="lines for so many of the dearest operations")
    parser.add_argument("--compile_into", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    changes = dict(one.split("=", 1) for one in given.changes)
    if given.compile_into:
        _compile(given.compile_into, given.config, changes, given.chip)
        return
    try:
        report, facts = measure(given.config, changes, given.chip)
    except tpu_cycles.DoesNotCompile as error:
        parser.exit(2, f"{error}\n")
    useful = 3 * facts["forward_flops"] / (report.figure * tpu_cycles.FLOPS_PER_CYCLE[given.chip])
    print(
        f"{given.config} {' '.join(given.changes)} on {given.chip}: {report.figure / 1e6:.1f} M cycles "
        f"({report.xla_cycles / 1e6:.1f} XLA, {report.kernel_figure / 1e6:.1f} kernels), MFU {useful:.0%}, "
        f"{facts['memory_bytes'] / 1e9:.1f} GB of main memory, {facts['temporaries'] / GIB:.2f} GiB of temporaries, "
        f"compiled in {facts['seconds']:.0f} s"
    )
    for line in [*dearest(report, given.top), *report.unknown]:
        print(line)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
