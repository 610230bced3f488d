"""Routed attention on TPUs beside what XLA makes of it: the tables of docs/kernels_routed.md.

    python -m benchmarks.routed_tpu [--chip=v5e] [--case='stage 1'] [--refresh] [--write]

BiFormer's stages 1 and 2 at 224 pixels, bf16, cycles by the TPU's compiler (`benchmarks/tpu_cycles.py`), every copy on
the way counted. XLA gathers regions by index or by products with zeros and ones, and the better one counts; its figures
are kept in benchmarks/routed_peers/ per chip and per version of the compiler, and `--refresh` measures them again.
`--write` puts the tables into the page.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import tpu_cycles
from benchmarks.neighborhood_tpu import versions
from benchmarks.pages import markdown, write_between

ROOT = Path(__file__).resolve().parent
PAGE = ROOT.parent / "docs" / "kernels_routed.md"
PEERS = ROOT / "routed_peers"
REGIONS = 7
HEAD_DIM = 32
GATHERS = ("index", "one_hot")
AIM = 2.0


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: a square map of `side` places, `REGIONS` regions along each axis."""

    stage: int
    side: int
    topk: int
    heads: int
    batch: int
    backward: bool

    @property
    def name(self) -> str:
        """What the tables call it."""
        size = f"stage {self.stage}, {self.side}x{self.side}, top {self.topk}, {self.heads} heads"
        return f"{size}, batch {self.batch}" + (", forward + backward" if self.backward else "")

    @property
    def least_bytes(self) -> int:
        """q, k, v and out once; backward reads q, k, v and the cotangent and writes three gradients."""
        maps = 11 if self.backward else 4
        return maps * self.batch * self.side**2 * self.heads * HEAD_DIM * 2

    @property
    def products(self) -> int:
        """FLOPs of the pairs that are routed: two products forward, five backward."""
        keys = self.topk * (self.side // REGIONS) ** 2
        return (14 if self.backward else 4) * self.batch * self.side**2 * keys * self.heads * HEAD_DIM

    def measure(self, side: str, chip: str, **options: Any) -> tpu_cycles.Report:
        """What a function of `benchmarks/routed_sides.py` costs."""
        width = self.heads * HEAD_DIM
        packed = f"bf16[{self.batch},{self.side},{self.side},{width}]"
        routes = f"s32[{self.batch},{REGIONS**2},{self.topk}]"
        arrays = [packed, f"bf16[{width},{3 * width}]", f"bf16[{width},{width}]"] if side == "layer" else [packed] * 3
        report = tpu_cycles.measure(
            f"benchmarks.routed_sides:{side}",
            *arrays,
            routes,
            *[packed] * self.backward,
            chip=chip,
            heads=self.heads,
            regions=REGIONS,
            **options,
        )
        for what in report.unknown:
            print(f"{self.name}, {side}: not counted: {what}", file=sys.stderr, flush=True)
        return report


STAGES = ((1, 56, 1, (2, 3)), (2, 28, 4, (4, 6)))
CASES = tuple(
    Case(stage, side, topk, heads, batch, backward)
    for stage, side, topk, sizes in STAGES
    for heads in sizes
    for batch in (1, 8)
    for backward in (False, True)
)


def peers(case: Case, chip: str, *, refresh: bool) -> dict[str, float]:
    """Figures of XLA by how regions are gathered, from the store or measured now."""
    path = PEERS / f"{chip}.json"
    store: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    mine = store.setdefault(versions(), {}).setdefault(case.name, {})
    for gather in GATHERS:
        if gather in mine and not refresh:
            continue
        mine[gather] = case.measure("xla", chip, gather=gather).figure
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(store, indent=1) + "\n")
    return mine


def row(case: Case, chip: str, others: Mapping[str, float]) -> dict[str, str]:
    """One line of a table."""
    report = case.measure("operator", chip, name="tpu")
    best = min(others, key=lambda gather: others[gather])
    matmul = sum(use.count * use.cost.slots["MATMUL"] / use.cost.capacity["MATMUL"] for use in report.kernels)
    moved = report.bytes + report.copied_beside
    return {
        "case": case.name,
        "ours, kcycles": f"{report.figure / 1e3:.1f}",
        "kernels (issued) + XLA": f"{report.kernel_figure / 1e3:.1f} ({report.cycles / 1e3:.1f})"
        f" + {report.xla_cycles / 1e3:.1f}",
        "MB": f"{moved / 1e6:.1f}",
        "XLA, kcycles": f"{others[best] / 1e3:.0f} ({best.replace('_', '-')})",
        "the other": " ".join(f"{figure / 1e3:.0f}" for gather, figure in others.items() if gather != best),
        "XLA : ours": f"{others[best] / report.figure:.1f}",
        "aim": f"{AIM:g}" if case.backward else "",
        "matrix unit busy": f"{matmul / report.figure:.0%}",
        "useful products": f"{case.products / tpu_cycles.FLOPS_PER_CYCLE[chip] / report.figure:.1%}",
        "bytes / least": f"{moved / case.least_bytes:.2f}",
        "spills": f"{report.spills:,.0f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", default="v5e", choices=tpu_cycles.TOPOLOGIES)
    parser.add_argument("--case", default="", help="part of the name of a case")
    parser.add_argument("--refresh", action="store_true", help="measure XLA again")
    parser.add_argument("--write", action="store_true", help="put the table into docs/kernels_routed.md")
    options = parser.parse_args()
    rows = []
    for case in (case for case in CASES if options.case in case.name):
        rows.append(row(case, options.chip, peers(case, options.chip, refresh=options.refresh)))
        print(rows[-1], file=sys.stderr, flush=True)
    text = f"{markdown(rows)}\n\n{options.chip}, {versions()}."
    print(text)
    if options.write:
        write_between(PAGE, f"routed {options.chip}", text)


if __name__ == "__main__":
    main()
