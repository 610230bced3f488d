"""Attention within windows on TPUs beside XLA's and splash attention: the tables of docs/kernels_window.md.

    python -m benchmarks.window_tpu [--chip=v5e] [--case=block] [--peers] [--refresh] [--write]

Cycles by the TPU's compiler (`benchmarks/tpu_cycles.py`), bf16, forward and backward, from packed projections to a
packed output, with a bias and its gradient. The cases are MaxViT's at 224 pixels (arXiv:2204.01697, table 1), and the
same with Swin's shift: windows of 7x7, heads of 32. What others take is kept in benchmarks/window_peers/ for each chip
and version of the compiler. `--peers` measures what is missing there and nothing of ours, `--refresh` all of it again.
`--write` puts the tables into the page.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import tpu_cycles
from benchmarks.neighborhood_tpu import versions
from benchmarks.pages import markdown, write_between

ROOT = Path(__file__).resolve().parent
PAGE = ROOT.parent / "docs" / "kernels_window.md"
PEERS = ROOT / "window_peers"
WINDOW, HEAD_DIM = 7, 32
AIM = 2.0
"""How many times fewer cycles than XLA's own attention it shall take."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Forward and backward pass of one layer."""

    side: int
    heads: int
    kind: str = "block"
    batch: int = 1

    @property
    def name(self) -> str:
        """What the tables call it."""
        return f"{self.side}x{self.side} {self.kind}, {self.heads} heads, batch {self.batch}"

    @property
    def options(self) -> dict[str, Any]:
        """What every side is told."""
        return {"window": WINDOW, "grid": self.kind == "grid"} | ({"shift": 3} if self.kind == "shifted" else {})

    def measure(self, side: str, chip: str, **options: Any) -> dict[str, float]:
        """The figures of a function of `benchmarks/window_sides.py`."""
        packed = f"bf16[{self.batch},{self.side},{self.side},{self.heads * HEAD_DIM}]"
        table = f"f32[{self.heads},{2 * WINDOW - 1},{2 * WINDOW - 1}]"
        function = f"benchmarks.window_sides:{side}"
        report = tpu_cycles.measure(
            function, packed, packed, packed, table, packed, chip=chip, **self.options, **options
        )
        for what in report.unknown:
            print(f"{self.name}, {side}: not counted: {what}", file=sys.stderr, flush=True)
        return {"figure": report.figure, "kernels": report.kernel_figure, "xla": report.xla_cycles}


# Sides and heads of the stages of MaxViT-Tiny and MaxViT-Base.
STAGES = ((56, 2, 3), (28, 4, 6), (14, 8, 12), (7, 16, 24))
CASES = (
    *(Case(side, heads, batch=batch) for side, heads, _ in STAGES for batch in (1, 8)),
    *(Case(side, heads, "grid", 8) for side, heads, _ in STAGES[:3]),
    *(Case(side, heads, batch=8) for side, _, heads in STAGES),
)
SHIFTED = tuple(Case(side, heads, "shifted", 8) for side, heads, _ in STAGES[:3])


# --- peers ------------------------------------------------------------------------------------------------------------


def peer_options(case: Case, chip: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, side and options of what a case is compared with."""
    tiny = any(case.heads == heads for _, heads, _ in STAGES)
    if case.kind == "shifted":
        yield "xla, rolled", "rolled", {}
        return
    yield "xla, heads last", "xla", {"order": "last"}
    if tiny and case.kind == "block" and case.batch == 8 and chip == "v5e":
        yield "xla, heads first", "xla", {"order": "first"}  # differs from the other by less than 1%
    if tiny and case.batch == 1 and case.side == STAGES[0][0]:
        for block in (256, 512):
            yield f"splash {block}", "splash", {"block": block}


def peers(case: Case, chip: str, *, measure: bool, refresh: bool) -> dict[str, Mapping[str, float]]:
    """Figures of the others, from the store or measured now.

    Raises:
      KeyError: some are missing and shall not be measured.
    """
    path = PEERS / f"{chip}.json"
    wanted = list(peer_options(case, chip))
    for label, side, options in wanted:
        if label in _stored(path, case) and not refresh:
            continue
        if not measure:
            raise KeyError(f"{case.name}: {label} is not in {path.name} for {versions()}; measure it with --peers")
        figures = case.measure(side, chip, **options)
        print(f"{chip} {case.name}, {label}: {figures['figure']:,.0f}", file=sys.stderr, flush=True)
        # Read again, since another process may have written meanwhile.
        store: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        store.setdefault(versions(), {}).setdefault(case.name, {})[label] = figures
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(store, indent=1) + "\n")
    found = _stored(path, case)
    return {label: found[label] for label, _, _ in wanted}


def _stored(path: Path, case: Case) -> dict[str, Mapping[str, float]]:
    store = json.loads(path.read_text()) if path.exists() else {}
    return store.get(versions(), {}).get(case.name, {})


# --- tables -----------------------------------------------------------------------------------------------------------


def row(case: Case, chip: str, others: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """One line of the table."""
    ours = case.measure("ours", chip)
    xla = min((label for label in others if label.startswith("xla")), key=lambda label: others[label]["figure"])
    splash = [one["figure"] for label, one in others.items() if label.startswith("splash")]
    return {
        "case": case.name,
        "ours, kcycles": f"{ours['figure'] / 1e3:.1f}",
        "kernels + XLA": f"{ours['kernels'] / 1e3:.1f} + {ours['xla'] / 1e3:.1f}",
        "XLA's own, kcycles": f"{others[xla]['figure'] / 1e3:.1f}",
        "XLA's : ours": f"{others[xla]['figure'] / ours['figure']:.1f}",
        "splash, no bias : ours": f"{min(splash) / ours['figure']:.1f}" if splash else "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", default="v5e", choices=tpu_cycles.TOPOLOGIES)
    parser.add_argument("--case", default="", help="part of the name of a case")
    parser.add_argument("--peers", action="store_true", help="only fill the store of peers")
    parser.add_argument("--refresh", action="store_true", help="measure the peers again")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/kernels_window.md")
    options = parser.parse_args()
    tables: dict[str, list[dict[str, str]]] = {"windows": [], "shifted": []}
    for case in (one for one in CASES + SHIFTED if options.case in one.name):
        title = "shifted" if case in SHIFTED else "windows"
        others = peers(case, options.chip, measure=options.peers or options.refresh, refresh=options.refresh)
        new = None if options.peers else row(case, options.chip, others)
        if new:
            tables[title].append(new)
            print(new, file=sys.stderr, flush=True)
            text = f"{markdown(tables[title])}\n\n{options.chip}, {versions()}."
            if options.write:  # after each case: a table takes most of an hour
                write_between(PAGE, f"{title} {options.chip}", text)
    for rows in filter(None, tables.values()):
        print(markdown(rows))


if __name__ == "__main__":
    main()
