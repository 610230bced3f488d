"""Neighborhood attention on TPUs beside splash attention and XLA's dense attention: the tables of docs/kernels.md.

    python -m benchmarks.neighborhood_tpu [--chip=v5e] [--case=dinat] [--peers] [--refresh] [--write]

Cycles by the TPU's compiler (`benchmarks/tpu_cycles.py`), bf16, from packed projections to a packed output, every copy
on the way counted. Splash attention is compiled with many block sizes and the best counts; since that takes an hour,
its figures are kept in benchmarks/neighborhood_peers/ per chip and per version of the compiler. `--peers` measures what
is missing there and nothing of ours, `--refresh` all of it again. `--write` puts the tables into docs/kernels.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import tpu_cycles
from benchmarks.pages import markdown, write_between
from kernels.neighborhood.pattern import Pattern, make_pattern

ROOT = Path(__file__).resolve().parent
PAGE = ROOT.parent / "docs" / "kernels.md"
PEERS = ROOT / "neighborhood_peers"
Figures = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem. `aim` is how many times fewer cycles than splash attention it shall take."""

    shape: tuple[int, ...]
    window: int
    head_dim: int
    dilation: int = 1
    heads: int = 4
    batch: int = 1
    backward: bool = False
    aim: float | None = None

    @property
    def name(self) -> str:
        """What the tables call it."""
        size = "x".join(map(str, self.shape))
        parts = [f"{size} window {self.window}", f"dilation {self.dilation}" if self.dilation > 1 else ""]
        parts += [f"D {self.head_dim}", f"{self.heads} heads" if self.heads != 4 else ""]
        parts += [f"batch {self.batch}" if self.batch > 1 else "", "forward + backward" if self.backward else ""]
        return ", ".join(filter(None, parts))

    @property
    def pattern(self) -> Pattern:
        """Which keys a query sees."""
        return make_pattern(self.shape, self.window, dilation=self.dilation)

    @property
    def least_bytes(self) -> int:
        """q, k, v and out once; backward reads these and the cotangent and writes three gradients."""
        return self.batch * self.pattern.bytes(self.head_dim, heads=self.heads) * (3 if self.backward else 1)

    @property
    def products(self) -> int:
        """FLOPs of the pairs that the pattern has: two products forward, five backward."""
        flops = self.batch * self.pattern.flops(self.head_dim, heads=self.heads)
        return flops * 7 // 2 if self.backward else flops

    @property
    def options(self) -> dict[str, Any]:
        """What every side is told."""
        return {"heads": self.heads, "window": self.window, "dilation": self.dilation}

    def report(self, side: str, chip: str, **options: Any) -> tpu_cycles.Report:
        """What a function of `benchmarks/neighborhood_sides.py` costs."""
        array = f"bf16[{','.join(map(str, (self.batch, *self.shape, self.heads * self.head_dim)))}]"
        report = tpu_cycles.measure(
            f"benchmarks.neighborhood_sides:{side}",
            *[array] * (4 if self.backward else 3),
            chip=chip,
            **self.options,
            **options,
        )
        for what in report.unknown:
            print(f"{self.name}, {side}: not counted: {what}", file=sys.stderr, flush=True)
        return report

    def measure(self, side: str, chip: str, **options: Any) -> dict[str, float]:
        """The figures of that which the tables show."""
        report = self.report(side, chip, **options)
        matmul = sum(use.count * use.cost.slots["MATMUL"] / use.cost.capacity["MATMUL"] for use in report.kernels)
        return {
            "cycles": report.cycles,
            "bytes": report.bytes + report.copied_beside,
            "kernels": report.kernel_figure,
            "xla": report.xla_cycles,
            "figure": report.figure,
            "matmul": matmul,
            "spills": report.spills,
        }


PLANE = (64, 64)
CASES = (
    Case(PLANE, 7, 128, aim=9),
    Case(PLANE, 7, 64, aim=8),
    Case(PLANE, 7, 32, aim=4.5),
    Case(PLANE, 7, 64, backward=True, aim=6),
    Case(PLANE, 13, 64, aim=5.5),
    Case(PLANE, 7, 64, dilation=4, aim=7),
    Case(PLANE, 7, 64, dilation=8, aim=8),
    Case((16384,), 255, 64, aim=3),
    Case((16, 32, 32), 5, 64, aim=6),
)
# Stages of DiNAT-Tiny and DiNAT-Base: side, dilations, heads of either.
STAGES = ((56, (1, 8), (2, 4)), (28, (1, 4), (4, 8)), (14, (1, 2), (8, 16)), (7, (1,), (16, 32)))
DINAT = tuple(
    Case((side, side), 7, 32, dilation=dilation, heads=heads, batch=batch)
    for side, dilations, sizes in STAGES
    for dilation in dilations
    for heads, batch in itertools.product(sizes, (1, 8))
)


def selected(text: str) -> dict[str, list[Case]]:
    """The cases of each table whose name contains `text`; all of a table whose title it is."""
    tables = {"cases": CASES, "dinat": DINAT}
    return {title: [one for one in cases if text == title or text in one.name] for title, cases in tables.items()}


# --- peers ------------------------------------------------------------------------------------------------------------


def splash_options(case: Case) -> Iterator[dict[str, Any]]:
    """Block sizes, orders and kernels that splash attention is tried with."""
    if case.batch > 1:
        return  # the kernel runs once an example, so nothing new would be seen
    largest = max(128, 2 ** (case.pattern.tokens - 1).bit_length())
    sizes = [size for size in (128, 256, 512) if size <= largest]
    squares = [(size, size) for size in sizes]
    # All pairs of sizes were tried for the first three cases on v5e; of those that are not square this was the best.
    wide = [] if case in DINAT or case.backward else [(256, 512)]
    blocks = [("tokens", *block) for block in squares + wide]
    if case.dilation > 1 and all(length % case.dilation == 0 for length in case.shape):
        blocks += [("groups", *block) for block in squares]
    for order, block_q, block_kv in blocks:
        for fused in (False, True) if case.backward and block_q == max(sizes) else (False,):
            yield {"block_q": block_q, "block_kv": block_kv, "order": order, "fused": fused}


def versions() -> str:
    """What the figures hold for."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))


def peers(case: Case, chip: str, *, measure: bool, refresh: bool) -> dict[str, Figures]:
    """Figures of splash attention by its options, and of XLA's dense attention, from the store or measured now.

    Raises:
      KeyError: some are missing and shall not be measured.
    """
    path = PEERS / f"{chip}.json"
    store: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    mine = store.setdefault(versions(), {}).setdefault(case.name, {})
    wanted: dict[str, tuple[str, dict[str, Any]]] = {_label(one): ("splash", one) for one in splash_options(case)}
    if case in DINAT:
        wanted |= {f"dense, heads {place}": ("dense", {"heads_first": place == "first"}) for place in ("first", "last")}
    for label, (side, options) in wanted.items():
        if label in mine and not refresh:
            continue
        if not measure:
            raise KeyError(f"{case.name}: {label} is not in {path.name} for {versions()}; measure it with --peers")
        try:
            mine[label] = case.measure(side, chip, **options)
        except tpu_cycles.DoesNotCompile as error:
            mine[label] = {"figure": float("inf")}
            print(f"{case.name}, {label}: {error}", file=sys.stderr)
        print(f"{chip} {case.name}, {label}: {mine[label]['figure']:,.0f}", file=sys.stderr, flush=True)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(store, indent=1) + "\n")
    return {label: mine[label] for label in wanted}


def _label(options: Mapping[str, Any]) -> str:
    blocks = f"{options['block_q']}/{options['block_kv']}"
    return blocks + (" by group" if options["order"] == "groups" else "") + (" fused" if options["fused"] else "")


# --- tables -----------------------------------------------------------------------------------------------------------


def row(case: Case, chip: str, others: Mapping[str, Figures]) -> dict[str, str]:
    """One line of a table."""
    ours = case.measure("ours", chip)
    splash = {label: one for label, one in others.items() if not label.startswith("dense")}
    dense = [one["figure"] for label, one in others.items() if label.startswith("dense")]
    cells = {
        "case": case.name,
        "ours, kcycles": f"{ours['figure'] / 1e3:.1f}",
        "issued + XLA": f"{ours['cycles'] / 1e3:.1f} + {ours['xla'] / 1e3:.1f}",
        "MB": f"{ours['bytes'] / 1e6:.1f}",
        "splash, kcycles": "",
        "splash : ours": "",
    }
    if splash:
        plain = min((label for label in splash if "group" not in label), key=lambda label: splash[label]["figure"])
        kernels, copies = splash[plain]["kernels"] / 1e3, splash[plain]["xla"] / 1e3
        cells["splash, kcycles"] = f"{kernels:.0f} + {copies:.0f} ({plain})"
        cells["splash : ours"] = f"{splash[plain]['figure'] / ours['figure']:.1f}"
    if case.aim:
        cells["aim"] = f"{case.aim:g}"
    grouped = [one["figure"] for label, one in splash.items() if "group" in label]
    cells["by group : ours"] = f"{min(grouped) / ours['figure']:.1f}" if grouped else ""
    if dense:
        cells["dense by XLA, kcycles"] = f"{min(dense) / 1e3:.1f}"
        cells["dense : ours"] = f"{min(dense) / ours['figure']:.1f}"
    cells["matrix unit busy"] = f"{ours['matmul'] / ours['figure']:.0%}"
    cells["useful products"] = f"{case.products / tpu_cycles.FLOPS_PER_CYCLE[chip] / ours['figure']:.0%}"
    cells["bytes / least"] = f"{ours['bytes'] / case.least_bytes:.2f}"
    cells["spills"] = f"{ours['spills']:,.0f}"
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", default="v5e", choices=tpu_cycles.TOPOLOGIES)
    parser.add_argument("--case", default="", help="part of the name of a case, or cases, or dinat")
    parser.add_argument("--peers", action="store_true", help="only fill the store of peers")
    parser.add_argument("--refresh", action="store_true", help="measure the peers again")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/kernels.md")
    options = parser.parse_args()
    for title, cases in selected(options.case).items():
        rows = []
        for case in cases:
            others = peers(case, options.chip, measure=options.peers or options.refresh, refresh=options.refresh)
            if not options.peers:
                rows.append(row(case, options.chip, others))
                print(rows[-1], file=sys.stderr, flush=True)
        if rows:
            source = "measured now" if options.refresh else "from the store of this version"
            text = f"{markdown(rows)}\n\n{options.chip}, {versions()}; splash attention and dense: {source}."
            print(text)
            if options.write:
                write_between(PAGE, f"{title} {options.chip}", text)


if __name__ == "__main__":
    main()
