"""What one run of an optimized XLA module costs a device: FLOPs, bytes of main memory, cycles, collectives.

Bodies of loops count as often as they run, which XLA's own cost analysis does not do. What is counted:

* FLOPs of matrix products and convolutions, 2 for a multiplication with its addition, padding and dilation holes left
  out (a batched product becomes a convolution with a dilated window on a TPU). Element-wise work is not counted.
* Bytes that instructions read from and write to main memory, padding to tiles included. A buffer that the compiler
  placed in a memory on the chip costs nothing; of a slice, or of an update in place, only the part counts.
* `estimated_cycles`, the compiler's own estimate of each instruction that it compiles itself. What runs beside others,
  copies or the work of a SparseCore, adds none.
* Collectives, each once, however many instructions a collective that runs beside others is spread over.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from training.plans.hlo import Buffer, Computation, Instruction, Module, trip_count

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
      kind: one of `KINDS`.
      size: bytes that a device puts in, padding not counted.
      groups: the devices that take part, as the module writes it; see `members`.
      overlapped: whether other instructions run between its start and its end.
      between_slices: whether it goes over the data-center network; each device then talks to those in its place in the
        other slices. (The compiler takes a sum over all devices of several slices apart into one inside each slice
        and one between them.)
    """

    kind: str
    size: int
    groups: str
    overlapped: bool
    between_slices: bool = False

    def sent(self, devices: int) -> float:
        """Bytes that one of `devices` sends (and receives) when they form a ring."""
        return (
            self.size
            * {
                "all-gather": devices - 1,
                "all-reduce": 2 * (devices - 1) / devices,
                "reduce-scatter": (devices - 1) / devices,
                "all-to-all": (devices - 1) / devices,
                "collective-permute": 1,
                "collective-broadcast": 1,
            }[self.kind]
        )


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a computation, on one device.

    Attributes:
      flops: of matrix products and convolutions; `product_bytes` are their operands and results, padding not counted.
      memory_bytes: read from and written to main memory.
      cycles: the compiler's estimates added up.
      collectives: how often each runs.
      kernels: how often each kernel written by hand (Pallas) runs. Its FLOPs are those that it states
        (`pl.CostEstimate`), its traffic is that of its operands and results, and it has no cycles.
      unknown_loops: loops whose trip count depends on data or cannot be told: what they belong to, and the cycles of
        one pass. They count as one pass.
    """

    flops: float = 0.0
    product_bytes: float = 0.0
    memory_bytes: float = 0.0
    cycles: float = 0.0
    collectives: Mapping[Collective, int] = dataclasses.field(default_factory=dict)
    kernels: Mapping[str, int] = dataclasses.field(default_factory=dict)
    unknown_loops: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def times(self, count: int) -> Cost:
        """The cost of running `count` times."""
        return Cost(
            *(getattr(self, name) * count for name in _NUMBERS),
            *({key: value * count for key, value in getattr(self, name).items()} for name in _TABLES),
        )


_NUMBERS = ("flops", "product_bytes", "memory_bytes", "cycles")
_TABLES = ("collectives", "kernels", "unknown_loops")


def total(costs: Iterable[Cost]) -> Cost:
    """The cost of running all of them."""
    costs = list(costs)
    tables: list[Counter] = [Counter() for _ in _TABLES]
    for cost in costs:
        for table, name in zip(tables, _TABLES, strict=True):
            table.update(getattr(cost, name))
    return Cost(*(sum(getattr(cost, name) for cost in costs) for name in _NUMBERS), *map(dict, tables))


def measure(module: Module) -> Cost:
    """The cost of one run of a module on one device."""
    return _Walk(module).computation(module.entry.name)


def members(groups: str, devices: int) -> list[tuple[int, ...]]:
    """Device numbers (places in the device assignment) of each group of a collective.

    Reads the ways in which XLA writes groups: `{{0,1},{2,3}}` (also pairs of sender and receiver), `{}` for everyone,
    `[2,2]<=[4]` with an optional transposition `T(1,0)`, and `mesh['a'=2,'b'=2] {'a'}`.

    Raises:
      ValueError: it is written in another way.
    """
    if groups in ("", "{}"):
        return [tuple(range(devices))]
    if re.fullmatch(r"\{(\{[\d,\s]*\},?\s*)+\}", groups):
        return [tuple(map(int, inner.split(","))) for inner in re.findall(r"\{([\d,\s]+)\}", groups)]
    if tiled := re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", groups):
        shape, source = ([int(size) for size in text.split(",")] for text in (tiled[1], tiled[2]))
        order = [int(axis) for axis in tiled[3].split(",")] if tiled[3] else list(range(len(source)))
        rows = np.arange(math.prod(source)).reshape(source).transpose(order).reshape(shape[0], -1)
        return [tuple(row.tolist()) for row in rows]
    if named := re.fullmatch(r"mesh\[([^\]]*)\] *\{('[^':]+'(?:, *'[^':]+')*)\}", groups):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        chosen = [list(axes).index(name) for name in re.findall(r"'([^']+)'", named[2])]
        others = [axis for axis in range(len(axes)) if axis not in chosen]
        sizes = list(axes.values())
        grid = np.arange(math.prod(sizes)).reshape(sizes).transpose(others + chosen)
        return [tuple(row.tolist()) for row in grid.reshape(-1, math.prod(sizes[axis] for axis in chosen))]
    raise ValueError(f"unknown notation of device groups: {groups[:100]}")


# Instructions that move nothing by themselves.
_GROUPING = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "opt-barrier")
_CALLING = ("while", "conditional", "call", "async-start", "async-update", "async-done")
_DONE = tuple(f"{kind}-done" for kind in ("copy", "slice", "send", "recv", *KINDS))
_FREE = frozenset((*_GROUPING, *_CALLING, *_DONE, "partition-id", "replica-id", "add-dependency"))
_FREE_TARGETS = ('"AllocateBuffer"', '"ConcatBitcast"', '"SliceId"')
_GROUPS = re.compile(
    r"(?:replica_groups|source_target_pairs)="
    r"(\{\{.*?\}\}|\{\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|mesh\[[^\]]*\][^{]*\{[^}]*\})"
)


class _Walk:
    """Costs of the computations of one module, each found once."""

    def __init__(self, module: Module):
        self.module = module
        self.computation = functools.cache(self._computation)
        self.fused = functools.cache(self._fused)

    def _computation(self, name: str) -> Cost:
        """Of a computation whose instructions run one after another."""
        where = self.module.computations[name]
        return total(self._instruction(where, one) for one in where.instructions.values())

    def _instruction(self, where: Computation, one: Instruction) -> Cost:
        if one.opcode == "while":
            trips = trip_count(self.module, where, one)
            inside = total(self.computation(called) for called in one.called("body", "condition"))
            if trips is None:
                return dataclasses.replace(inside, unknown_loops={_label(one): inside.cycles})
            return inside.times(trips)
        if one.opcode == "conditional":
            # One branch runs; the dearest stands for it.
            branches = one.called("branch_computations", "true_computation", "false_computation")
            return max(
                (self.computation(called) for called in branches),
                key=lambda cost: (cost.cycles, cost.flops, cost.memory_bytes),
            )
        if one.opcode == "async-start":
            cost = total(self.computation(called) for called in one.called("calls"))
            beside = {dataclasses.replace(key, overlapped=True): count for key, count in cost.collectives.items()}
            return dataclasses.replace(cost, collectives=beside, cycles=0.0)
        # A custom call holds what runs on a SparseCore: sums of gradients on a TPU7x, for example.
        if called := one.called("called_computations") or (one.called("to_apply") if one.opcode == "call" else []):
            return total(self.computation(name) for name in called)
        cycles = Cost(cycles=float(one.config("estimated_cycles") or 0))
        if one.opcode == "fusion":
            fused = self.module.computations[one.called("calls")[0]]
            return total([cycles, self.fused(fused.name), Cost(memory_bytes=self._fusion_bytes(where, one, fused))])
        return total([cycles, _work(where, one), Cost(memory_bytes=_moved(where, one))])

    def _fused(self, name: str) -> Cost:
        """Of what a fusion computes; what it moves is up to the fusion as a whole, but for exchanges."""
        where = self.module.computations[name]
        costs = []
        for one in where.instructions.values():
            if one.opcode == "fusion":
                costs.append(self.fused(one.called("calls")[0]))
            else:
                work = _work(where, one)
                costs.append(dataclasses.replace(work, memory_bytes=_moved(where, one)) if work.collectives else work)
        return total(costs)

    def _fusion_bytes(self, where: Computation, fusion: Instruction, inside: Computation) -> float:
        """Main memory that a fusion reads and writes: of an operand of which it takes slices, only these; of an output
        that it updates in place, only the update; nothing of what it hands through.
        """
        read = sum(
            self._read(inside, inside.parameters[number], buffer)
            for number, operand in enumerate(fusion.operands)
            for buffer in where.instructions[operand].outputs
            if buffer.in_hbm
        )
        return read + self._results_written(inside, fusion.outputs)

    def _results_written(self, inside: Computation, outputs: tuple[Buffer, ...]) -> float:
        """Bytes of main memory that a fusion writes."""
        root = inside.root
        if root.opcode == "fusion":
            return self._results_written(self.module.computations[root.called("calls")[0]], outputs)
        # A start of an exchange gives several values without a tuple.
        results = root.operands if root.opcode == "tuple" else (root.name,) * len(outputs)
        return sum(
            self._written(inside, result, buffer)
            for result, buffer in zip(results, outputs, strict=True)
            if buffer.in_hbm
        )

    def _read(self, inside: Computation, name: str, buffer: Buffer) -> float:
        """Bytes read of `buffer`, which is called `name` in a fusion."""
        read = 0.0
        for user in inside.users.get(name, ()):
            first = user.operands[0] == name
            if user.opcode == "bitcast":
                read += self._read(inside, user.name, buffer)
            elif user.opcode == "fusion":
                nested = self.module.computations[user.called("calls")[0]]
                numbers = [number for number, operand in enumerate(user.operands) if operand == name]
                read += sum(self._read(nested, nested.parameters[number], buffer) for number in numbers)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and first:
                read += user.outputs[0].padded
            elif not (_hands_on(user) or (user.opcode == "dynamic-update-slice" and first)):
                return buffer.padded
        return min(read, buffer.padded)

    def _written(self, inside: Computation, name: str, buffer: Buffer) -> float:
        """Bytes written to the output `buffer`, which is called `name` in a fusion."""
        one = inside.instructions[name]
        while one.opcode == "bitcast":
            one = inside.instructions[one.operands[0]]
        if one.opcode == "parameter" or _hands_on(one):
            return 0.0
        if one.opcode == "dynamic-update-slice":
            return min(inside.instructions[one.operands[1]].outputs[0].padded, buffer.padded)
        if one.opcode == "fusion" and len(one.outputs) == 1:
            return self._results_written(self.module.computations[one.called("calls")[0]], (buffer,))
        return buffer.padded


def _hands_on(one: Instruction) -> bool:
    """Whether an instruction of a fusion is part of an exchange (counted on its own) or only groups values."""
    if one.opcode == "custom-call":
        return "AsyncCollective" in one.attribute("custom_call_target")
    return one.opcode == "tuple" or one.opcode.removesuffix("-start") in KINDS


def _moved(where: Computation, one: Instruction) -> float:
    """Main memory that an instruction which is no fusion reads and writes."""
    if one.opcode in _FREE or one.attribute("custom_call_target") in _FREE_TARGETS:
        return 0.0
    operands = [buffer for operand in one.operands for buffer in where.instructions[operand].outputs]
    if one.opcode in ("dynamic-slice", "slice", "gather", "copy-start", "slice-start"):
        # A start gives (what it writes, what it reads, a flag), a slice's in another order; the smallest is the part.
        arrays = [buffer for buffer in one.outputs if buffer.dims]
        part = min(arrays, key=lambda buffer: buffer.padded, default=one.outputs[0])
        target = next((buffer for buffer in arrays if buffer.in_hbm != operands[0].in_hbm), part)
        return part.padded * (operands[0].in_hbm + target.in_hbm)
    if one.opcode == "dynamic-update-slice":
        return operands[1].padded * (operands[1].in_hbm + one.outputs[0].in_hbm)
    if one.opcode == "scatter":
        # Reads the updates and the places that they go to, and writes these.
        return operands[-1].padded * (operands[-1].in_hbm + 2 * one.outputs[0].in_hbm)
    read = sum(buffer.padded for buffer in operands if buffer.in_hbm)
    written = sum(buffer.padded for buffer in one.outputs if buffer.in_hbm)
    # A start lists its operands among its outputs.
    return max(read, written) if one.opcode.endswith("-start") or one.opcode == "send" else read + written


def _work(where: Computation, one: Instruction) -> Cost:
    """FLOPs, exchanges and kernels of an instruction itself."""
    if one.opcode in ("convolution", "dot"):
        left, right = (where.instructions[operand].outputs[0] for operand in one.operands)
        count = convolution_flops if one.opcode == "convolution" else dot_flops
        touched = left.size + right.size + one.outputs[0].size
        return Cost(flops=float(count(one, left.dims, right.dims)), product_bytes=touched)
    if one.opcode == "custom-call" and one.attribute("custom_call_target") == '"tpu_custom_call"':
        return Cost(flops=float(one.config("flops") or 0), kernels={_label(one): 1})
    kind, flag = one.opcode.removesuffix("-start"), one.config("flag_start")
    if transfer := re.search(r'_xla_megascale_transfer_type="(\w+)"', one.attributes):
        if one.opcode != "send":
            return Cost()
        kind = transfer[1].lower().replace("_", "-")
        size = where.instructions[one.operands[0]].outputs[0].size
        kind = kind if kind in KINDS else "collective-permute"
        return Cost(collectives={Collective(kind, size, "", overlapped=True, between_slices=True): 1})
    # Of an exchange that is spread over several fusions, those after the first carry the number of a flag.
    if kind not in KINDS or int(flag or -1) >= 0:
        return Cost()
    if kind == "collective-permute" and where.instructions[one.operands[0]].opcode == "broadcast":
        return Cost()  # A sum that goes around a ring step by step starts by passing zeros on.
    size = sum(buffer.size for operand in one.operands for buffer in where.instructions[operand].outputs)
    groups = _GROUPS.search(one.attributes)
    if kind == "all-reduce" and _only_slices_are_used(where, one.name):
        kind = "reduce-scatter"
    collective = Collective(kind, size, groups[1] if groups else "", one.opcode.endswith("-start") or bool(flag))
    return Cost(collectives={collective: 1})


def _label(one: Instruction) -> str:
    """What an instruction belongs to, in the words of the traced program."""
    found = re.search(r'op_name="([^"]*)"', one.attributes)
    return found[1] if found else one.name


def _only_slices_are_used(where: Computation, name: str) -> bool:
    """Whether a fusion takes only slices of a sum: that is how a reduce-scatter is written."""
    users = where.users.get(name, [])
    return bool(users) and all(
        user.opcode == "dynamic-slice"
        or (user.opcode in ("get-tuple-element", "bitcast", "reshape") and _only_slices_are_used(where, user.name))
        for user in users
    )


# --- FLOPs of one product ---------------------------------------------------------------------------------------------


def dot_flops(one: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """2 x elements of the result x length of the sums."""
    del right
    contracted = [int(axis) for axis in one.attribute("lhs_contracting_dims").split(",") if axis]
    return 2 * math.prod(one.outputs[0].dims) * math.prod(left[axis] for axis in contracted)


def convolution_flops(one: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """2 x input features of a group x output features x examples x pairs of a place and a window element that meet a
    number of the input.
    """
    inputs, kernel, outputs = re.split(r"_|->", one.attribute("dim_labels"))
    window = dict(re.findall(r"(\w+)=(\S+)", one.attribute("window")))
    result = one.outputs[0].dims

    def sizes(name: str, default: str, place: int) -> str:
        return window[name].split("x")[place] if name in window else default

    pairs = 1
    for place, label in enumerate(sorted(label for label in inputs if label.isdigit())):
        low, _, _ = sizes("pad", "0_0", place).partition("_")
        pairs *= _meeting_pairs(
            size=left[inputs.index(label)],
            window=int(sizes("size", "1", place)),
            places=result[outputs.index(label)],
            stride=int(sizes("stride", "1", place)),
            before=int(low),
            dilation=int(sizes("lhs_dilate", "1", place)),
            window_dilation=int(sizes("rhs_dilate", "1", place)),
        )
    examples = left[inputs.index("b")] // int(one.attribute("batch_group_count") or 1)
    return 2 * right[kernel.index("i")] * right[kernel.index("o")] * examples * pairs


def _meeting_pairs(
    *, size: int, window: int, places: int, stride: int, before: int, dilation: int, window_dilation: int
) -> int:
    """Along one axis: how many (place, window element) pairs meet a number, not padding or a hole of dilation."""
    at = np.arange(places)[:, None] * stride + np.arange(window)[None] * window_dilation - before
    return int(np.count_nonzero((at >= 0) & (at <= (size - 1) * dilation) & (at % dilation == 0)))
