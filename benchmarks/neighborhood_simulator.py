"""What tilings of a neighborhood pattern compute, and what they can gain over dense attention: a table and a plot.

    python -m benchmarks.neighborhood_simulator --map=64x64 --window=7 [--tile=8x16 ...] [--kv_tile=8x16]
        [--stride=1] [--dilation=1] [--causal] [--plot=simulation.png] [--measure=v5e] [--write]

Two ways to take keys (`kernels/neighborhood/simulator.py`): aligned tiles, as kernels made from dense attention do, and
free boxes, as the kernels here do. `--measure` compiles the TPU kernel with each tile and sets its cycles beside, and
`--write` puts that table into docs/kernels.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks import tpu_cycles
from benchmarks.neighborhood_tpu import PAGE
from benchmarks.pages import write_between
from kernels.neighborhood import simulator
from kernels.neighborhood.pattern import Pattern, make_pattern
from tasks import charts

Extents = tuple[int, ...]
LANES = 128
"""Queries lie in the lanes of the TPU kernel: those of a tile are filled up to a multiple of it."""


def extents(text: str) -> Extents:
    """Reads `8x16`."""
    return tuple(int(part) for part in text.split("x"))


def written(tile: Sequence[int | None]) -> str:
    """The reverse of `extents`."""
    return "x".join("-" if extent is None else str(extent) for extent in tile)


def usual_tiles(pattern: Pattern) -> list[Extents]:
    """Tiles of 64 to 256 queries with extents that are powers of two and fit the groups."""
    longest = [2 ** math.ceil(math.log2(-(-axis.length // axis.dilation))) for axis in pattern.axes]
    powers = [[2**n for n in range(10) if 2**n <= length] for length in longest]
    most = min(64, math.prod(longest))
    return [tile for tile in itertools.product(*powers) if most <= math.prod(tile) <= 256]


def table(pattern: Pattern, tiles: Sequence[Extents], kv_tile: Extents | None, cycles: dict[Extents, float]) -> str:
    """One line for each tile of queries, in Markdown; keys are cut as queries are unless `kv_tile` says otherwise."""
    names = ["tile", "tiles", "aligned: tiles of keys", "keys a query", "useful", "gain at most", "stride for 100%"]
    names += ["free: box", "keys a query", "useful", "gain at most", "stride for one window"]
    names += ["pairs in full lanes", "kcycles of the TPU kernel", "cycles a 1000 of these"] if cycles else []
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for tile in tiles:
        cut = kv_tile or tile
        aligned, free = simulator.simulate(pattern, tile, cut), simulator.simulate(pattern, tile, multiple=8)
        cells = [written(tile), str(free.tiles), f"{aligned.visited / aligned.tiles:.1f} of {written(cut)}"]
        for one, stride in (
            (aligned, simulator.perfect_stride(pattern, tile, cut)),
            (free, simulator.sharing_stride(pattern, tile)),
        ):
            cells += [] if one.is_aligned else [written(one.kv_tile)]
            cells += [f"{one.visited * math.prod(one.kv_tile) / one.tiles:.0f}", f"{one.efficiency:.0%}"]
            cells += [f"{one.gain:.1f}", written(stride)]
        if cycles:
            filled = free.computed * -(-math.prod(tile) // LANES) * LANES / math.prod(tile)
            cells += [f"{filled:,.0f}", f"{cycles[tile] / 1e3:.1f}", f"{cycles[tile] / filled * 1e3:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(pattern: Pattern, tiles: Sequence[Extents], kv_tile: Extents | None, path: Path) -> None:
    """The most that each way can gain over dense attention: by tile, and by stride with the best tile for each."""

    def gains(pattern: Pattern, tile: Extents) -> tuple[float, float]:
        aligned = simulator.simulate(pattern, tile, kv_tile or tile)
        return aligned.gain, simulator.simulate(pattern, tile).gain

    ordered = sorted(tiles, key=lambda tile: (math.prod(tile), tile))
    strides = range(1, min(axis.window for axis in pattern.axes) + 1)
    with charts.style():
        figure = Figure(figsize=(charts.WHOLE, 4), layout="constrained")
        by_tile, by_stride = figure.subplots(1, 2)
        for axes in (by_tile, by_stride):
            axes.axhline(pattern.tokens**2 / pattern.pairs, color=charts.MUTED, linestyle="--", label="nothing in vain")
            axes.set_ylim(bottom=0)
            axes.grid(axis="x", visible=False)
        ways = (("aligned tiles of keys", charts.BLUE, -0.2), ("one free box of keys", charts.ORANGE, 0.2))
        for number, (label, color, offset) in enumerate(ways):
            heights = [gains(pattern, tile)[number] for tile in ordered]
            by_tile.bar([x + offset for x in range(len(ordered))], heights, 0.4, color=color, label=label)
            best = []
            for stride in strides:
                changed = Pattern(tuple(dataclasses.replace(axis, stride=stride) for axis in pattern.axes))
                best.append(max(gains(changed, tile)[number] for tile in ordered))
            by_stride.plot(strides, best, "o-", color=color, label=label)
        by_tile.set_xticks(range(len(ordered)), [written(tile) for tile in ordered], rotation=60, ha="right")
        by_tile.set_ylabel("FLOPs of dense attention / computed")
        by_tile.set_xlabel("tile of queries")
        by_stride.set_xlabel("stride, with the best of these tiles")
        by_stride.legend(loc="center right", bbox_to_anchor=(1, 0.7))
        dilation = written([axis.dilation for axis in pattern.axes])
        figure.suptitle(f"{written(pattern.shape)}, window {written(pattern.window)}, dilation {dilation}")
        figure.savefig(path, dpi=110, facecolor="white")


def measured(pattern: Pattern, tiles: Sequence[Extents], chip: str, heads: int, head_dim: int) -> dict[Extents, float]:
    """Figures (cycles) of the forward TPU kernel with each tile; tiles that it does not take are left out."""
    array = f"bf16[1,{','.join(map(str, pattern.shape))},{heads * head_dim}]"
    found = {}
    for tile in tiles:
        try:
            report = tpu_cycles.measure(
                "benchmarks.neighborhood_sides:ours",
                *[array] * 3,
                chip=chip,
                heads=heads,
                window=[axis.window for axis in pattern.axes],
                dilation=[axis.dilation for axis in pattern.axes],
                stride=[axis.stride for axis in pattern.axes],
                tile=tile,
            )
        except tpu_cycles.DoesNotCompile:
            continue
        found[tile] = report.figure
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--map", type=extents, default=(64, 64))
    parser.add_argument("--window", type=extents, default=(7,))
    parser.add_argument("--stride", type=extents, default=(1,))
    parser.add_argument("--dilation", type=extents, default=(1,))
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--tile", type=extents, nargs="*", help="tiles of queries; usual ones unless given")
    parser.add_argument("--kv_tile", type=extents, help="aligned tiles of keys; as those of queries unless given")
    parser.add_argument("--plot", type=Path, help="a PNG file")
    parser.add_argument("--measure", metavar="CHIP", help="set cycles of the TPU kernel beside, 4 heads of 64")
    parser.add_argument("--write", action="store_true", help="put the table into docs/kernels.md")
    options = parser.parse_args()
    rank = len(options.map)
    per_axis = {
        name: value * rank if len(value) == 1 else value
        for name, value in (("window", options.window), ("stride", options.stride), ("dilation", options.dilation))
    }
    try:
        pattern = make_pattern(options.map, **per_axis, is_causal=options.causal)
        tiles = options.tile or usual_tiles(pattern)
        cycles = measured(pattern, tiles, options.measure, 4, 64) if options.measure else {}
        tiles = [tile for tile in tiles if tile in cycles] if options.measure else tiles
        text = table(pattern, tiles, options.kv_tile, cycles)
        print(text)
        if options.write:
            write_between(PAGE, f"simulator {options.measure}", text)
        if options.plot:
            plot(pattern, tiles, options.kv_tile, options.plot)
    except ValueError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
