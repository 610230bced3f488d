"""Finds the tiles of the TPU kernels that take the fewest cycles and writes kernels/neighborhood/tuning/<chip>.json.

    python -m benchmarks.neighborhood_tune [--chip=v5e] [--case=dinat] [--direction=forward] [--most=6]

For each case of `benchmarks/neighborhood_tpu.py` the tiles that the kernels' own model ranks first are compiled, and
the one with the smallest figure (`benchmarks/tpu_cycles.py`: cycles, bytes and XLA's own work) is kept. Entries of
cases that are not measured stay.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import tpu_cycles
from benchmarks.neighborhood_tpu import Case, selected, versions
from kernels.neighborhood import tpu_choice, tuning

DIRECTIONS = ("forward", "backward")


def ranked(case: Case, most: int) -> list[tuple[tuple[int, ...], int]]:
    """Tiles and residues to try, those first that the model takes for the fastest."""

    def cost(candidate: tuple[tuple[int, ...], int]) -> float:
        tile, residues = candidate
        return tpu_choice.cost(case.pattern, case.heads, case.head_dim, tile, residues)

    return sorted(tpu_choice.candidates(case.pattern), key=cost)[:most]


def tune(case: Case, direction: str, chip: str, most: int) -> dict[str, Any]:
    """The record of the best tile for a case."""
    case = dataclasses.replace(case, backward=direction == "backward", batch=1)
    found = []
    for tile, residues in ranked(case, most):
        try:
            report = case.report("ours", chip, tile=tile, residues=residues)
        except tpu_cycles.DoesNotCompile as error:
            print(f"{case.name}, tile {tile} x {residues}: {error}", file=sys.stderr)
            continue
        # The forward kernel runs before the backward one, and has tiles of its own.
        other = [use.figure(chip) for use in report.kernels if case.backward and "forward" in use.name]
        figure = report.figure - sum(other)
        print(f"{case.name}, tile {tile} x {residues}: {figure:,.0f}", file=sys.stderr, flush=True)
        found.append((figure, tile, residues))
    figure, tile, residues = min(found)
    problem = tuning.problem(case.pattern, case.head_dim, "bfloat16", direction)
    return {**dataclasses.asdict(problem), "tile": tile, "residues": residues, "cycles": round(figure)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", default="v5e", choices=tpu_cycles.TOPOLOGIES)
    parser.add_argument("--case", default="", help="part of the name of a case, or cases, or dinat")
    parser.add_argument("--direction", choices=DIRECTIONS, help="both unless given")
    parser.add_argument("--most", type=int, default=6, help="tiles to try for each case")
    options = parser.parse_args()
    path = tuning.FOLDER / f"{options.chip}.json"
    records = json.loads(path.read_text())["entries"] if path.exists() else []
    done = set()
    for case in itertools.chain(*selected(options.case).values()):
        for direction in [options.direction] if options.direction else DIRECTIONS:
            key = tuning.problem(case.pattern, case.head_dim, "bfloat16", direction)
            if key in done:
                continue
            done.add(key)
            new = json.loads(json.dumps(tune(case, direction, options.chip, options.most)))
            records = [old for old in records if any(old[name] != new[name] for name in dataclasses.asdict(key))]
            records.append(new)
            write(path, options.chip, records)


def write(path: Path, chip: str, records: Sequence[Mapping[str, Any]]) -> None:
    """One line an entry."""
    head = {"command": f"python -m benchmarks.neighborhood_tune --chip={chip}", "versions": versions()}
    lines = ",\n".join(f"  {json.dumps(record)}" for record in records)
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'{json.dumps(head)[:-1]}, "entries": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
