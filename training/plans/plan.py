"""What a run will need and take on TPUs, from a machine that has none: memory, FLOPs, exchanges, time, largest batch.

The real train step is compiled for the real topology by the TPU's own compiler (libtpu), with the sharding that the run
would have, and the result is read (`training/plans/hlo.py`, `training/plans/hlo_cost.py`). docs/plans.md explains every
figure.
"""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

import data
import models
from configs import Config
from data import synthetic
from training.distributed import mesh
from training.plans import hlo, hlo_cost
from training.plans.chips import GIB, Topology
from training.run import feeding
from training.run.run import Run, prepare

MOST_CONFIRMATIONS = 3
FILLED = 0.97  # share of the memory at which the search for the largest batch aims


class DoesNotFit(ValueError):
    """A step needs more memory than a device has; `needed` and `usable` in bytes."""

    def __init__(self, message: str, needed: float, usable: float):
        super().__init__(message)
        self.needed, self.usable = needed, usable


@dataclasses.dataclass(frozen=True)
class Exchange:
    """All exchanges of one kind in a step, on one device: how often, bytes that it sends, seconds."""

    kind: str
    network: str
    count: int
    sent: float
    seconds: float
    overlapped_seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """One compiled step; sizes in bytes and times in seconds, of one device.

    Attributes:
      unit, units_per_example: what the speed is counted in.
      parts: what the arguments of the step consist of, by name, padding not counted.
      arguments, outputs, temporaries, code: as the compiler says; outputs without those that take an argument's place.
      kept: activations that the forward pass keeps for the backward pass, traced (`models.summarize`); a part of the
        temporaries.
      forward_flops: of the matrix products of the forward pass, by the traced model.
    """

    topology: Topology
    axes: Mapping[str, int]
    model: str
    precision: str
    batch_size: int
    parts: Mapping[str, int]
    arguments: int
    outputs: int
    temporaries: int
    code: int
    kept: int
    forward_flops: float
    cost: hlo_cost.Cost
    exchanges: tuple[Exchange, ...]
    compile_seconds: float
    unit: str
    units_per_example: float

    @property
    def devices(self) -> int:
        """How many there are."""
        return math.prod(self.axes.values())

    @property
    def memory(self) -> int:
        """Everything that has to fit."""
        return self.arguments + self.outputs + self.temporaries + self.code

    @property
    def compute_seconds(self) -> float:
        """Matrix products at the peak rate."""
        return self.cost.flops / self.topology.chip.flops

    @property
    def memory_seconds(self) -> float:
        """Main memory traffic of the compiled step at the full bandwidth."""
        return self.cost.memory_bytes / self.topology.chip.hbm_bandwidth

    @property
    def cycle_seconds(self) -> float:
        """The compiler's cycle estimates, one instruction after another."""
        return self.cost.cycles / self.topology.chip.clock

    def exchange_seconds(self, network: str | None = None) -> float:
        """All exchanges, one after another, over `"ICI"` or `"DCN"` or both."""
        return sum(one.seconds for one in self.exchanges if network in (None, one.network))

    @property
    def least_seconds(self) -> float:
        """What no schedule can beat: the slowest of the matrix units, the arguments and outputs, and each network."""
        touched = (self.arguments + self.outputs + sum(self.parts.values())) / self.topology.chip.hbm_bandwidth
        return max(self.compute_seconds, touched, self.exchange_seconds("ICI"), self.exchange_seconds("DCN"))

    @property
    def exposed_seconds(self) -> float:
        """Exchanges that nothing runs beside, and what others take longer than everything else."""
        overlapped = sum(one.overlapped_seconds for one in self.exchanges)
        return self.exchange_seconds() - overlapped + max(0.0, overlapped - self.busy_seconds)

    @property
    def busy_seconds(self) -> float:
        """Computing, or waiting for main memory if that takes longer."""
        return max(self.cycle_seconds, self.memory_seconds)

    @property
    def step_seconds(self) -> float:
        """The step as compiled."""
        return self.busy_seconds + self.exposed_seconds

    def utilization(self, seconds: float) -> float:
        """FLOPs of the model over what the matrix units could do in `seconds` (MFU, arXiv:2204.02311): three forward
        passes at most, so that what is computed again does not count.
        """
        return min(self.cost.flops, 3 * self.forward_flops) / (seconds * self.topology.chip.flops)


# --- compiling --------------------------------------------------------------------------------------------------------


def make(config: Config, topology: Topology, *, keep: Path | None = None) -> Plan:
    """Compiles the train step of `config` for `topology` and reads what it costs.

    Args:
      keep: a file for the text of the compiled program.

    Raises:
      DoesNotFit: it needs more memory than a device has.
      ValueError: the configuration cannot work, or not on these devices.
    """
    run = prepare(config, source=_source(config), devices=topology.devices())
    begin = time.perf_counter()
    jitted: Any = run.step
    batch = run.task.batch_spec(config.data.batch_size, train=True)
    lowered = jitted.lower(run.template, batch, run.partner_arrays)
    with tempfile.TemporaryDirectory() as folder:
        # The compiler writes the program itself: `compiled.as_text()` fails where libtpu moves work to a SparseCore,
        # whose instructions jaxlib cannot read back.
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if (needed := needed_bytes(str(error))) is None:
                raise
            raise _does_not_fit(run, topology, needed) from error
        seconds = time.perf_counter() - begin
        (program,) = Path(folder).glob("*.after_codegen.txt")
        cost = hlo_cost.measure(hlo.parse(program.read_text()))
        if keep is not None:
            keep.write_text(program.read_text())
    stats = compiled.memory_analysis()
    accumulated = config.optim.accumulate
    ways = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    share = run.task.example_inputs(config.data.batch_size // (ways * accumulated))
    model = models.summarize(run.model, share, call=run.task.answer).total
    return Plan(
        topology=topology,
        axes=dict(run.mesh.shape),
        model=run.task.model_name,
        precision=config.train.precision,
        batch_size=config.data.batch_size,
        parts=_parts(run),
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        kept=model.activation_bytes // run.mesh.shape["tensor"],
        forward_flops=2.0 * model.multiply_adds * accumulated / run.mesh.shape["tensor"],
        cost=cost,
        exchanges=_exchanges(cost, topology, list(run.mesh.devices.flat)),
        compile_seconds=seconds,
        unit=run.task.unit,
        units_per_example=run.task.units_per_example(),
    )


def _source(config: Config) -> data.Source:
    """The training set, or for a known one that is not on this machine a stand-in of the same size."""
    name = config.data.name
    try:
        return feeding.open_source(config, name, config.data.train_split)
    except FileNotFoundError as error:
        if (other := synthetic.stand_in(name)) is None:
            raise FileNotFoundError(
                f"{error}; a plan needs only its size: --config.data.name={synthetic.STAND_IN}"
            ) from error
        return data.open_source(other, split=config.data.train_split, cache="none")


def _parts(run: Run) -> dict[str, int]:
    """Bytes of the arguments on one device."""

    def size(tree: Any, shardings: Any) -> int:
        leaves = jax.tree.leaves(tree)
        places = jax.tree.leaves(jax.tree.broadcast(shardings, tree))
        return sum(
            math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf, place in zip(leaves, places, strict=True)
        )

    batch = run.task.batch_spec(run.config.data.batch_size, train=True)
    state, places = run.template, run.shardings
    small = {"health", "metrics", "key", "step"}
    return {
        "parameters": size(state.params, places.params),
        "other model state": size(state.model_state, places.model_state),
        "optimizer": size(state.opt_state, places.opt_state),
        "moving average": size(state.ema, places.ema),
        "batch": size(batch, mesh.batch_sharding(run.mesh)),
        "partner models": size(run.partner_arrays, run.partner_shardings),
        "counters": sum(size(getattr(state, name), getattr(places, name)) for name in small),
    }


def _exchanges(cost: hlo_cost.Cost, topology: Topology, devices: list[Any]) -> tuple[Exchange, ...]:
    """Times of the exchanges on a ring, or on a torus where a group spans several axes."""
    chip = topology.chip
    rows: dict[tuple[str, str], list[float]] = {}
    for one, count in cost.collectives.items():
        if one.between_slices:
            network, bandwidth, size = "DCN", chip.network_bandwidth, topology.slices
        else:
            group = max(hlo_cost.members(one.groups, len(devices) // topology.slices), key=len)
            network, size = "ICI", len(group)
            # A pair of neighbours has one port; the halves of a chip are joined by a link as fast as six (TPU7x).
            ports = topology.ports([devices[number] for number in group]) or 6
            ports = 1 if one.kind == "collective-permute" else ports
            bandwidth = ports * chip.port_bandwidth / chip.devices
        sent = one.sent(size) * count
        row = rows.setdefault((one.kind, network), [0, 0.0, 0.0, 0.0])
        for place, value in enumerate((count, sent, sent / bandwidth, one.overlapped * sent / bandwidth)):
            row[place] += value
    return tuple(Exchange(kind, network, int(row[0]), *row[1:]) for (kind, network), row in sorted(rows.items()))


def needed_bytes(message: str) -> float | None:
    """What a step needs in all, by the compiler's complaint that it does not fit; None for another complaint."""
    # There are two ways to say so; the first says "temporaries" and means arguments and results too.
    sizes = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", message) or re.search(
        r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message
    )
    return float(sizes[1]) * 1024 ** (1 + "KMGT".index(sizes[2])) if sizes else None


def _does_not_fit(run: Run, topology: Topology, needed: float) -> DoesNotFit:
    """One line: what is needed, what there is, what to change."""
    config, usable = run.config, topology.chip.usable_hbm
    batch, parts = config.data.batch_size, config.optim.accumulate
    state = sum(size for name, size in _parts(run).items() if name != "batch")
    multiple = run.mesh.shape["data"] * run.mesh.shape["fsdp"] * parts
    changes = []
    if config.model.remat != "full":
        changes.append("model.remat=full")
    if batch // multiple > 1:
        changes.append(f"optim.accumulate={2 * parts}")
    if run.mesh.shape["data"] > 1:
        changes.append(f"mesh.fsdp={run.mesh.size // run.mesh.shape['tensor'] // topology.slices}")
    if smaller := int(batch * max(usable - state, 0) / (needed - state)) // multiple * multiple:
        changes.append(f"data.batch_size={smaller}")
    message = (
        f"{run.task.model_name} with data.batch_size={batch} does not fit on {topology}: a step needs "
        f"{needed / GIB:.2f} GiB a device, there are {usable / GIB:.2f} GiB; more chips help, or "
        f"{', '.join(f'--config.{change}' for change in changes) or 'a smaller model'}"
    )
    return DoesNotFit(message, needed, usable)


# --- the largest batch ------------------------------------------------------------------------------------------------


def largest_batch(
    memory: Callable[[int], float], first: tuple[int, float], usable: float, multiple: int
) -> tuple[int, float]:
    """The largest batch that fits, by a straight line through two measured sizes and a third that confirms it.

    Args:
      memory: bytes that a batch needs; raises DoesNotFit.
      first: a batch that fits and its memory.
      usable: bytes to fill.
      multiple: of which a batch has to be one.

    Returns:
      The batch and its memory, both measured. Past a confirmation that fails, the line goes on from what it measured,
      a few times at most.
    """
    # What does not grow with the batch makes this fit; far from the first, the line is drawn well.
    best, other = first, int(0.9 * first[0] * usable / first[1]) // multiple * multiple
    if other < 1.25 * first[0]:
        other = first[0] // 2 // multiple * multiple or first[0] + multiple

    def measured(batch: int) -> tuple[bool, float]:
        try:
            return True, memory(batch)
        except DoesNotFit as error:
            return False, error.needed

    fits, needed = measured(other)
    line = (other, needed)
    best = max(best, line) if fits else best
    most = math.inf if fits else 0.95 * other
    for _ in range(MOST_CONFIRMATIONS):
        slope = (line[1] - first[1]) / (line[0] - first[0])
        if slope <= 0:
            return best
        guess = int(first[0] + (usable - first[1]) / slope)
        guess = int(min(guess, most)) // multiple * multiple
        if guess <= best[0]:
            return best
        fits, needed = measured(guess)
        if fits:
            return guess, needed
        # Near the limit the compiler recomputes to save memory, and what it says is no longer on a line.
        line, most = (guess, needed), 0.95 * guess
    return best
