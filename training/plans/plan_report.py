"""A plan as text, and the command `python train.py --config=FILE --plan=TOPOLOGY`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import configs
from configs import Config
from training.plans import plan
from training.plans.chips import GIB, Topology
from training.plans.plan import Plan

Row = tuple[str, str, str]
SMALL = 10_000  # bytes; rows below are left out


def command(config: Config, topology: Topology, batches: bool) -> None:
    """Prints the plan of a run on a topology, then, if asked for, the largest batch that fits.

    Raises:
      ValueError: the compiler knows no such topology, the configuration cannot work there, or a step does not fit.
    """
    made = plan.make(config, topology)
    print(table(made), flush=True)
    if batches:
        batch, needed, compilations = search(made, config)
        shards = made.axes["data"] * made.axes["fsdp"]
        print(
            f"\nlargest batch: {batch} ({batch // shards} on each of {shards} shards), {_gib(needed)} of "
            f"{_gib(topology.chip.usable_hbm)}; {compilations} more compilations"
        )


def search(made: Plan, config: Config) -> tuple[int, float, int]:
    """The largest batch that fits, the bytes that it needs, and how many compilations it took to find it."""
    compilations = 0

    def memory(batch: int) -> float:
        nonlocal compilations
        compilations += 1
        print(f"compiling for a batch of {batch} ...", file=sys.stderr, flush=True)
        # Durations in epochs may come to less than a step with a large batch; memory does not depend on them.
        changes = {"data__batch_size": batch, "train__steps": 1000, "optim__warmup": 0, "optim__cooldown": 0}
        return plan.make(configs.replace(config, **changes), made.topology).memory

    multiple = made.axes["data"] * made.axes["fsdp"] * config.optim.accumulate
    fill = plan.FILLED * made.topology.chip.usable_hbm
    batch, needed = plan.largest_batch(memory, (made.batch_size, float(made.memory)), fill, multiple)
    return batch, needed, compilations


def table(made: Plan) -> str:
    """The plan in four blocks: memory, work, exchanges, time."""
    topology, chip = made.topology, made.topology.chip
    axes = " x ".join(f"{axis} {size}" for axis, size in made.axes.items())
    whole = "a chip" if chip.devices == 1 else f"one of the {chip.devices} devices of a chip"
    head = (
        f"{made.model}, batch {made.batch_size}, {made.precision}, on {topology}: {made.devices} devices, {axes}\n"
        f"figures are those of {whole}; compiled in {made.compile_seconds:.0f} s"
    )
    blocks = [_memory(made), _work(made), _exchanges(made), _time(made)]
    widths = [max(len(row[column]) for block in blocks for row in block) for column in (0, 1)]
    text = "\n\n".join(
        "\n".join(f"{name.ljust(widths[0])}  {value.rjust(widths[1])}  {note}".rstrip() for name, value, note in block)
        for block in blocks
    )
    return "\n\n".join([head, text, *_warnings(made)])


def _memory(made: Plan) -> Sequence[Row]:
    usable = made.topology.chip.usable_hbm
    sizes = {**made.parts, "padding of these": made.arguments - sum(made.parts.values())}
    beside = {"results beside their arguments": made.outputs, "code": made.code}
    return [
        ("memory", "", ""),
        *((f"  {name}", _gib(size), "") for name, size in sizes.items() if size >= SMALL),
        (
            "  activations and temporaries",
            _gib(made.temporaries),
            f"the forward pass keeps {_gib(made.kept)} for the backward pass",
        ),
        *((f"  {name}", _gib(size), "") for name, size in beside.items() if size >= SMALL),
        ("  total", _gib(made.memory), ""),
        ("  head-room", _gib(usable - made.memory), f"of {_gib(usable)}"),
    ]


def _work(made: Plan) -> Sequence[Row]:
    cost, chip = made.cost, made.topology.chip
    return [
        ("work of a step", "", ""),
        (
            "  matrix products",
            f"{cost.flops / 1e9:,.1f} GFLOP",
            f"{cost.flops / made.forward_flops:.3f} times the forward pass",
        ),
        (
            "  arithmetic intensity",
            f"{cost.flops / cost.product_bytes:.1f} FLOP/B",
            f"of operands and results; the chip is in balance at {chip.flops / chip.hbm_bandwidth:.0f}",
        ),
        ("  main memory traffic", f"{cost.memory_bytes / 1e9:.3f} GB", f"{cost.flops / cost.memory_bytes:.1f} FLOP/B"),
    ]


def _exchanges(made: Plan) -> Sequence[Row]:
    rows = [
        (
            f"  {one.kind} ({one.network})",
            f"{one.count} x",
            f"{one.sent / 1e6:.3f} MB sent, {_ms(one.seconds)}, {_ms(one.overlapped_seconds)} of it beside other work",
        )
        for one in made.exchanges
    ]
    return [("exchanges of a step", "", ""), *(rows or [("  none", "", "")])]


def _time(made: Plan) -> Sequence[Row]:
    def rate(seconds: float) -> str:
        speed = made.batch_size * made.units_per_example / seconds
        return f"{speed:,.0f} {made.unit}/s, MFU {made.utilization(seconds):.1%}"

    share = made.exchange_seconds() / made.step_seconds
    return [
        ("time of a step", "", ""),
        ("  products at peak rate", _ms(made.compute_seconds), f"{made.topology.chip.flops / 1e12:.0f} TFLOP/s"),
        (
            "  memory at full bandwidth",
            _ms(made.memory_seconds),
            f"{made.topology.chip.hbm_bandwidth / 1e9:.0f} GB/s",
        ),
        (
            "  compiler's cycle estimates",
            _ms(made.cycle_seconds),
            f"{made.cost.cycles / 1e6:.2f} M cycles at {made.topology.chip.clock / 1e9:.2f} GHz",
        ),
        ("  exchanges", _ms(made.exchange_seconds()), f"{share:.1%} of the step; {_ms(made.exposed_seconds)} exposed"),
        ("  at least", _ms(made.least_seconds), f"{rate(made.least_seconds)}: the slowest part alone"),
        (
            "  as compiled",
            _ms(made.step_seconds),
            f"{rate(made.step_seconds)}: cycles or memory, and exposed exchanges",
        ),
    ]


def _warnings(made: Plan) -> list[str]:
    lines = []
    if loops := made.cost.unknown_loops:
        cycles = sum(loops.values()) / made.topology.chip.clock
        lines.append(f"counted as one pass, since data decide how often they run ({_ms(cycles)}): {', '.join(loops)}")
    if kernels := made.cost.kernels:
        names = ", ".join(f"{name} ({count} x)" for name, count in kernels.items())
        lines.append(f"kernels, counted with the FLOPs that they state and without cycles: {names}")
    return lines


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if abs(size) >= 0.1 * GIB else f"{size / 2**20:.2f} MiB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"
