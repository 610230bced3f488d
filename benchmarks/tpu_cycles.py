"""Cycles, bytes and slots of a function on a TPU, by the TPU's own compiler on a machine that has none.

    python -m benchmarks.tpu_cycles MODULE:FUNCTION 'bf16[1,4096,256]' ... [--static='{"window": 7}'] [--chip=v5e]

Needs the extra `plan`. The function is compiled in a process of its own (where the compiler writes its dumps is fixed
when it is loaded), each Pallas kernel in it is read by `benchmarks/llo.py`, the rest by `training/plans/hlo_cost.py`.
The figure is the sum over kernels of max(issue cycles, bytes / bandwidth) plus the compiler's estimates of the cycles
of its own operations, and no less than all copied bytes / bandwidth.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import llo
from training.plans import hlo, hlo_cost
from training.plans.chips import CHIPS

ROOT = Path(__file__).resolve().parent.parent
# The smallest topology of each kind that can be described.
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:2x2x1"}
BYTES_PER_CYCLE = {
    "v4": 1228e9 / 1.05e9,  # Cloud TPU documentation, v4: bandwidth of main memory, clock
    **{name: chip.hbm_bandwidth / chip.clock for name, chip in CHIPS.items()},
}
FLOPS_PER_CYCLE = {"v4": 8 * 2 * 128**2, **{name: chip.flops_per_cycle for name, chip in CHIPS.items()}}
SLOTS = ("MATMUL", "MATPUSH", "XLU", "VALU", "EUP", "VLOAD", "VSTORE")


class DoesNotCompile(ValueError):
    """The compiler refused; the message is its own last line."""


@dataclasses.dataclass(frozen=True)
class KernelUse:
    """A Pallas kernel and how often the program runs it; costs are of one run."""

    name: str
    count: int
    cost: llo.Kernel

    def figure(self, chip: str) -> float:
        """Cycles that one run needs at least: it issues or it waits for memory, whichever takes longer."""
        return max(self.cost.cycles, self.cost.bytes / BYTES_PER_CYCLE[chip])


@dataclasses.dataclass(frozen=True)
class Report:
    """What one run of a function costs a core of a chip.

    Attributes:
      kernels: written by hand (Pallas).
      operations: cycles of the instructions that XLA compiled itself, by name, all runs of each together.
      copied_beside: bytes of copies that XLA lets run beside other work; it states no cycles for them.
      unknown: what could not be counted, in words.
      text: the compiled module.
    """

    chip: str
    kernels: tuple[KernelUse, ...]
    operations: Mapping[str, float]
    copied_beside: float
    unknown: tuple[str, ...]
    text: str = dataclasses.field(repr=False)

    @property
    def cycles(self) -> float:
        """Issue cycles of all kernels."""
        return sum(use.count * use.cost.cycles for use in self.kernels)

    @property
    def bytes(self) -> float:
        """Moved between main memory and the chip by all kernels."""
        return sum(use.count * use.cost.bytes for use in self.kernels)

    @property
    def kernel_figure(self) -> float:
        """Of all kernels, one after another."""
        return sum(use.count * use.figure(self.chip) for use in self.kernels)

    @property
    def xla_cycles(self) -> float:
        """The compiler's estimate of everything else."""
        return sum(self.operations.values())

    @property
    def figure(self) -> float:
        """What implementations are compared by; at least the time that main memory needs for all that is copied."""
        waits = (self.bytes + self.copied_beside) / BYTES_PER_CYCLE[self.chip]
        return max(self.kernel_figure + self.xla_cycles, waits)

    @property
    def spills(self) -> int:
        """Of all kernels."""
        return sum(use.count * use.cost.spills for use in self.kernels)

    def table(self) -> str:
        """For people."""
        lines = [f"{'kernel':40} {'runs':>5} {'cycles':>10} {'MB':>8} {'figure':>10}  bound, use of the slots"]
        for use in self.kernels:
            cost, figure = use.cost, use.figure(self.chip)
            bound = "memory" if figure > cost.cycles else cost.busiest
            shares = " ".join(f"{slot} {cost.share(slot):.0%}" for slot in SLOTS)
            lines.append(
                f"{use.name:40} {use.count:5} {cost.cycles:10,} {cost.bytes / 1e6:8.2f} {figure:10,.0f}"
                f"  {bound}; {shares}; spills {cost.slots.get('VSTORE:SPILL', 0):,},"
                f" fills {cost.slots.get('VLOAD:FILL', 0):,}"
            )
        for name, cycles in sorted(self.operations.items(), key=lambda item: -item[1]):
            lines.append(f"{'XLA: ' + name:40} {'':5} {cycles:10,.0f}")
        lines.append(
            f"figure on {self.chip}: {self.figure:,.0f}; kernels {self.kernel_figure:,.0f}, XLA {self.xla_cycles:,.0f}"
            f"; copied beside other work: {self.copied_beside / 1e6:.2f} MB"
        )
        return "\n".join([*lines, *(f"NOT COUNTED: {one}" for one in self.unknown)])


def measure(function: str, *arguments: Any, chip: str = "v5e", keep: str | Path | None = None, **static: Any) -> Report:
    """Compiles `function(*arguments, **static)` for a chip and counts.

    Args:
      function: `"module:name"`, importable from the root of the repository or from PYTHONPATH.
      arguments: anything with `shape` and `dtype`, or texts such as `"bf16[1,64,64,256]"`.
      keep: a folder for the compiler's dumps, which are thrown away otherwise.
      static: keyword arguments that JSON can carry.

    Raises:
      ValueError: there is no such chip.
      DoesNotCompile: the function cannot be compiled for it.
    """
    if chip not in TOPOLOGIES:
        raise ValueError(f"chip={chip!r}; allowed: {', '.join(TOPOLOGIES)}")
    job = {
        "function": function,
        "arguments": [one if isinstance(one, str) else _written(one) for one in arguments],
        "static": static,
        "topology": TOPOLOGIES[chip],
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(keep or scratch).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.txt"):
            left.unlink()
        command = [sys.executable, "-m", "benchmarks.tpu_cycles", "--compile_into", str(folder)]
        options: dict[str, Any] = {"env": environment(folder), "cwd": ROOT, "capture_output": True, "text": True}
        done = subprocess.run(command, input=json.dumps(job), **options)
        if done.returncode:
            raise DoesNotCompile(f"{function} for {chip}: {last_words(done.stderr)}")
        return read(folder, chip)


def environment(folder: Path) -> dict[str, str]:
    """Of a process that compiles for a TPU and dumps what its compiler makes into a folder."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
    }


def read(folder: Path, chip: str) -> Report:
    """The report of a compiled module and the compiler's dumps, which lie in one folder."""
    text = (folder / MODULE).read_text()
    module = hlo.parse(text)
    cost = hlo_cost.measure(module)
    unknown = [f"loop {name}, passes unknown" for name in cost.unknown_loops]
    runs = _runs(module)
    kernels, operations, beside = [], {}, 0.0
    for computation in module.computations.values():
        for one in computation.instructions.values():
            times = runs.get(computation.name, 0)
            if not times:
                continue
            if one.attribute("custom_call_target") == '"tpu_custom_call"':
                kernel = _kernel(folder, one.name, chip)
                kernels.append(KernelUse(one.name, times, kernel))
                unknown += [f"{one.name}: {what}" for what in kernel.unknown]
            elif one.opcode in ("copy-start", "slice-start"):
                beside += times * min(buffer.padded for buffer in one.outputs if buffer.dims)
            elif cycles := float(one.config("estimated_cycles") or 0):
                operations[one.name] = times * cycles
    if abs(sum(operations.values()) - cost.cycles) > 1e-6 * cost.cycles:
        unknown.append(f"operations of XLA: {sum(operations.values()):,.0f} cycles or {cost.cycles:,.0f}")
    return Report(chip, tuple(kernels), operations, beside, tuple(unknown), text)


MODULE = "compiled.txt"


def _runs(module: hlo.Module) -> dict[str, int]:
    """How often each computation runs whose instructions run one after another; loops of unknown length as one pass."""
    runs: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        runs[name] = runs.get(name, 0) + times
        where = module.computations[name]
        for one in where.instructions.values():
            if one.opcode == "while":
                trips = hlo.trip_count(module, where, one)
                for inside in one.called("body", "condition"):
                    visit(inside, times * (1 if trips is None else trips))
            elif one.opcode in ("call", "conditional"):
                for inside in one.called("to_apply", "branch_computations", "true_computation", "false_computation"):
                    visit(inside, times)

    visit(module.entry.name, 1)
    return runs


def _kernel(folder: Path, name: str, chip: str) -> llo.Kernel:
    stages = {
        stage: sorted(
            path
            for path in folder.glob(f"*-{stage}.txt")
            if re.fullmatch(rf"\d+-{re.escape(name)}-\d+-{stage}\.txt", path.name)
        )
        for stage in ("final_bundles", "post-delay-converter", "final_hlo-static-per-bundle-utilization")
    }
    for stage, paths in stages.items():
        if not paths:
            raise ValueError(f"the compiler dumped no {stage} of {name}")
    schedule, stage, slots = (paths[-1].read_text() for paths in stages.values())
    return llo.read(schedule, stage, slots, chip)


def last_words(stderr: str) -> str:
    """The error that ended a process."""
    lines = [line for line in stderr.splitlines() if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return lines[-1] if lines else stderr[-500:]


# --- in the process that compiles -------------------------------------------------------------------------------------

_DTYPES = {"bf16": "bfloat16", "f32": "float32", "f16": "float16", "s32": "int32", "s8": "int8", "pred": "bool"}


def _written(one: Any) -> str:
    names = {full: short for short, full in _DTYPES.items()}
    return f"{names[str(one.dtype)]}[{','.join(map(str, one.shape))}]"


def _compile(folder: Path) -> None:
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    job = json.load(sys.stdin)
    module, _, name = job["function"].partition(":")
    function = functools.partial(getattr(importlib.import_module(module), name), **job["static"])
    device = topologies.get_topology_desc(job["topology"], platform="tpu").devices[0]
    mesh = jax.sharding.Mesh([device], ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = []
    for text in job["arguments"]:
        dtype, _, sizes = text.rstrip("]").partition("[")
        shape = tuple(int(size) for size in sizes.split(",") if size)
        arguments.append(jax.ShapeDtypeStruct(shape, jnp.dtype(_DTYPES.get(dtype, dtype)), sharding=sharding))
    # Some lowering rules ask the mesh in force which TPU they are for.
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(*arguments).compile()
    (folder / MODULE).write_text(compiled.as_text() or "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("function", nargs="?", help="module:name")
    parser.add_argument("arguments", nargs="*", help="such as bf16[1,64,64,256]")
    parser.add_argument("--static", type=json.loads, default={}, help="further keyword arguments, as JSON")
    parser.add_argument("--chip", default="v5e", choices=TOPOLOGIES)
    parser.add_argument("--keep", help="a folder for the compiler's dumps")
    parser.add_argument("--compile_into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile_into:
        _compile(options.compile_into)
        return
    if not options.function:
        parser.error("which function? module:name")
    try:
        report = measure(options.function, *options.arguments, chip=options.chip, keep=options.keep, **options.static)
    except DoesNotCompile as error:
        parser.exit(2, f"{error}\n")
    print(report.table())


if __name__ == "__main__":
    main()
