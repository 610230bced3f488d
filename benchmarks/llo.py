"""Reads what the TPU compiler dumps of one kernel: its VLIW schedule, its loops, the use of its slots, its copies.

A bundle is what a core issues in one cycle. `read` weighs each with how often its loops run, which gives a lower bound
of the kernel's cycles: waiting for copies is not in it. Copies between main memory and the chip are counted by the
size that the instruction carries, padding to tiles included. Regions under a condition count as if they always ran.

Three of the files that `--xla_jf_dump_llo_text=true` makes the compiler write are read: the last stage that still says
what its loops count (`post-delay-converter`), the final schedule (`final_bundles`), and the slots that each bundle of
it uses (`final_hlo-static-per-bundle-utilization`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

# A branch takes effect some bundles after its own; those in between run in every pass of the loop that it closes.
DELAY_SLOTS = {"v4": 1, "v5e": 4, "v5p": 4, "v6e": 4, "tpu7x": 6}
GRANULE = {"v4": 512, "v5e": 32, "v5p": 32, "v6e": 32, "tpu7x": 32}
"""Bytes of the unit in which sizes of copies are written."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What one run of a kernel costs a core.

    Attributes:
      cycles: bundles issued.
      bytes_in, bytes_out: copied from and to main memory.
      slots: how often each kind of slot is used; `capacity` is how many of a kind a bundle has.
      unknown: loops and copies whose size is no constant, in words. The loops count as one pass, the copies as nothing.
    """

    cycles: int
    bytes_in: int
    bytes_out: int
    slots: Mapping[str, int]
    capacity: Mapping[str, int]
    unknown: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Copied in either direction."""
        return self.bytes_in + self.bytes_out

    @property
    def spills(self) -> int:
        """Registers that did not suffice: stores to and loads from memory that only the allocator asked for."""
        return self.slots.get("VSTORE:SPILL", 0) + self.slots.get("VLOAD:FILL", 0)

    def share(self, slot: str) -> float:
        """Of all slots of a kind, how many are used."""
        return self.slots.get(slot, 0) / (self.cycles * self.capacity[slot])

    @property
    def busiest(self) -> str:
        """The kind of slot with the largest share."""
        return max((slot for slot in self.slots if ":" not in slot), key=self.share)


_LOOP = re.compile(r"^\s*loop: start=(-?\d+), step=(-?\d+), limit=(-?\d+)")
_BODY = re.compile(r"^\s*\$region(\d+):.*// loop_body")
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:")
_BRANCH = re.compile(r"\bsbr\.rel (?:\(!(%\w+)\) )?[^;}]*target = \$region(\d+)")
# `dma.hbm_to_vmem ...` between two blocks without gaps, `dma.general ...` with strides, from and to pointers.
_COPY = re.compile(r"\bdma\.(?:(\w+)_to_(\w+)|general) ([^;}]*?/\*size_in_granules=\*/([^,\s]+)[^;}]*)")
_CONDITION = re.compile(r"\((%\w+)\)")
_END = re.compile(r"/\*(?:src|dst)=\*/(%\w+|\[#allocation\d+)")
_POINTER = re.compile(r"(%\w+) = \w+\.(hbm|vmem|smem)\b")
_CONSTANT = re.compile(r"(%\w+) = smov\.u32 (?:\([^)]*\), )?(\[#allocation\d+)\]")
_ALLOCATION = re.compile(r"^\s*(#allocation\d+) \[.*?\bspace=(\w+)", re.MULTILINE)


def trip_counts(stage: str) -> dict[int, int | None]:
    """How often the body of each loop runs, by the number of its region; None where that is no constant.

    `stage` is a dump in which loops are announced (`loop: start=0, step=1, limit=7`) before their body.
    """
    trips: dict[int, int | None] = {}
    announced: int | None = None
    for line in stage.splitlines():
        if found := _LOOP.match(line):
            start, step, limit = map(int, found.groups())
            # The test stands at the end of the body.
            announced = max(1, math.ceil((limit - start) / step))
        elif found := _BODY.match(line):
            trips[int(found[1])] = announced
            announced = None
    return trips


def read(schedule: str, stage: str, utilization: str, chip: str) -> Kernel:
    """The cost of a kernel, from three dumps of it.

    Raises:
      ValueError: they do not fit each other, or are written in a way that this module does not know.
    """
    bundles = _bundles(schedule)
    names, capacity, rows = _utilization(utilization)
    if len(rows) != len(bundles):
        raise ValueError(f"{len(bundles)} bundles in the schedule and {len(rows)} in the table of slots")
    weights, leaving, unknown = _weights(bundles, trip_counts(stage), DELAY_SLOTS[chip])
    spaces = _spaces(schedule, stage)
    bytes_in = bytes_out = 0
    for number, bundle in enumerate(bundles):
        for *named, operands, size in _COPY.findall(bundle):
            weight = weights[number]
            for condition in _CONDITION.findall(operands):
                weight //= leaving.get((number, condition), 1)
            source, target = named if any(named) else (spaces.get(end, "?") for end in _END.findall(operands))
            if "hbm" not in (source, target) and "?" not in (source, target):
                continue
            if not size.isdigit() or "?" in (source, target):
                unknown.append(f"a copy from {source} to {target}, size {size}")
                continue
            bytes_in += (source == "hbm") * weight * int(size) * GRANULE[chip]
            bytes_out += (target == "hbm") * weight * int(size) * GRANULE[chip]
    slots = {
        name: sum(weight * row[column] for weight, row in zip(weights, rows, strict=True))
        for column, name in enumerate(names)
    }
    return Kernel(sum(weights), bytes_in, bytes_out, slots, capacity, tuple(unknown))


def _spaces(schedule: str, stage: str) -> dict[str, str]:
    """The memory that pointers (`%s98_s27`) and allocations (`[#allocation3`) of a kernel lie in."""
    spaces = {f"[{name}": space for name, space in _ALLOCATION.findall(stage)}
    spaces |= {name: spaces[allocation] for name, allocation in _CONSTANT.findall(schedule) if allocation in spaces}
    return spaces | dict(_POINTER.findall(schedule))


def _bundles(schedule: str) -> list[str]:
    """The text of each bundle; comments may run over several lines."""
    bundles: list[str] = []
    for line in schedule.splitlines():
        if _BUNDLE.match(line):
            bundles.append(line)
        elif bundles:
            bundles[-1] += "\n" + line
    if not bundles:
        raise ValueError("no bundles in the schedule")
    return bundles


def _weights(
    bundles: Sequence[str], trips: Mapping[int, int | None], delay: int
) -> tuple[list[int], dict[tuple[int, str], int], list[str]]:
    """How often each bundle is issued, and loops that cannot be counted.

    A loop reaches from the bundle that begins its body to the last delay slot of the branch that goes back there. What
    stands, behind the test, under the condition that ends the loop runs in its last pass only: for each such slot and
    condition, the second result has the number of passes.
    """
    weights, unknown = [1] * len(bundles), []
    leaving: dict[tuple[int, str], int] = {}
    for last, bundle in enumerate(bundles):
        for condition, region in ((condition, int(region)) for condition, region in _BRANCH.findall(bundle)):
            if region not in trips:
                continue  # forwards, over a region under a condition
            first = next((i for i in range(last + 1) if re.search(rf"Start region {region}\b", bundles[i])), None)
            if first is None:
                raise ValueError(f"the loop of region {region} has an end and no beginning")
            end = min(last + delay + 1, len(bundles))
            count = trips[region]
            if count is None:
                unknown.append(f"a loop of {end - first} bundles with an unknown number of passes")
                continue
            for inside in range(first, end):
                weights[inside] *= count
            if condition:
                tested = (i + 1 for i in range(first, last) if f"{condition} = " in bundles[i])
                leaving |= {(slot, condition): count for slot in range(next(tested, last + 1), end)}
    return weights, leaving, unknown


def _utilization(table: str) -> tuple[list[str], dict[str, int], list[list[int]]]:
    """Names of the slots, how many a bundle has of each, and the use in each bundle."""
    lines = [line.strip() for line in table.splitlines() if line.strip()]
    if len(lines) < 4 or not lines[0].startswith("=="):
        raise ValueError("no table of slots")
    names = [name.strip() for name in lines[1].split(",")]
    capacity = dict(zip(names, map(int, lines[2].split()), strict=True))
    return names, capacity, [list(map(int, line.split())) for line in lines[4:]]
