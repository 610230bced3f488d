"""The table of docs/plans.md: what a train step needs and takes on TPUs, compiled on this machine.

    python -m benchmarks.plans [--only=v5e] [--no_batch_search] [--write]

Needs the extra `plan`. A case is a minute or two of compilation, four times as much with the search for the largest
batch; `--write` puts the table into docs/plans.md, between its two marks, where columns that were not made again stay.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import configs
from benchmarks.pages import marks, write_between
from training.plans import chips

CONFIG = "configs/vit_b16_imagenet.py"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "plans.md"
MARKS = marks("table")


@dataclasses.dataclass(frozen=True)
class Case:
    """A column: a topology and what differs from the configuration file."""

    topology: str
    changes: Mapping[str, Any]
    search: bool = True


CASES = (
    Case("v5e:16x16", {"data.batch_size": 4096}),
    Case("v5e:16x16", {"data.batch_size": 4096, "mesh.data": 1, "mesh.fsdp": 256}, search=False),
    Case("v5p:4x8x8", {"data.batch_size": 4096}),
    Case("v6e:16x16", {"data.batch_size": 4096}),
    Case("tpu7x:4x4x8", {"data.batch_size": 4096}),
    Case("v5p:8x16x16", {"data.batch_size": 32768, "mesh.fsdp": 8}, search=False),
)


def column(case: Case, search: bool) -> dict[str, str]:
    """Figures of one case by name."""
    from training.plans import plan, plan_report  # after `use_compiler`

    config = configs.load(CONFIG, case.changes)
    topology = chips.parse(case.topology)
    made = plan.make(config, topology)
    print(plan_report.table(made), file=sys.stderr, flush=True)
    gib = {name: size / chips.GIB for name, size in made.parts.items()}
    figures = {
        "devices": f"{made.devices}",
        "mesh": " x ".join(f"{axis} {size}" for axis, size in made.axes.items() if size > 1),
        "batch": f"{made.batch_size}",
        "parameters": f"{gib['parameters']:.3f} GiB",
        "optimizer": f"{gib['optimizer']:.3f} GiB",
        "moving average": f"{gib['moving average']:.3f} GiB",
        "batch on a device": f"{gib['batch']:.3f} GiB",
        "activations and temporaries": f"{made.temporaries / chips.GIB:.2f} GiB",
        "- kept for the backward pass": f"{made.kept / chips.GIB:.2f} GiB",
        "code": f"{made.code / chips.GIB:.3f} GiB",
        "total": f"{made.memory / chips.GIB:.2f} GiB",
        "total / (state, batch, kept, code)": f"{made.memory / (sum(made.parts.values()) + made.kept + made.code):.2f}",
        "head-room": f"{(topology.chip.usable_hbm - made.memory) / chips.GIB:.2f} GiB",
        "matrix products": f"{made.cost.flops / 1e12:.3f} TFLOP",
        "arithmetic intensity of the products": f"{made.cost.flops / made.cost.product_bytes:.0f} FLOP/B",
        "main memory traffic": f"{made.cost.memory_bytes / 1e9:.2f} GB",
        **{f"{one.kind}, times": str(one.count) for one in made.exchanges},
        **{f"{one.kind}, sent": f"{one.sent / 1e6:.1f} MB" for one in made.exchanges},
        "products at peak rate": f"{1e3 * made.compute_seconds:.2f} ms",
        "memory at full bandwidth": f"{1e3 * made.memory_seconds:.2f} ms",
        "compiler's cycle estimates": f"{1e3 * made.cycle_seconds:.2f} ms",
        "exchanges": f"{1e3 * made.exchange_seconds():.2f} ms",
    }
    for name, seconds in (("at least", made.least_seconds), ("as compiled", made.step_seconds)):
        figures[f"step {name}"] = f"{1e3 * seconds:.2f} ms"
        figures[f"images/s {name}"] = f"{made.batch_size / seconds:,.0f}"
        figures[f"MFU {name}"] = f"{made.utilization(seconds):.1%}"
    figures["share of exchanges as compiled"] = f"{made.exchange_seconds() / made.step_seconds:.1%}"
    figures["compilation"] = f"{made.compile_seconds:.0f} s"
    if search and case.search:
        batch, needed, _ = plan_report.search(made, config)
        figures["largest batch"] = f"{batch} ({needed / chips.GIB:.2f} GiB)"
    return figures


def markdown(columns: Mapping[str, Mapping[str, str]]) -> str:
    """Figures as rows, cases as columns."""
    names = list(dict.fromkeys(name for figures in columns.values() for name in figures))
    # What only some cases have stands where it stands in the fullest of them.
    fullest = max((list(figures) for figures in columns.values()), key=len)
    names.sort(key=lambda name: fullest.index(name) if name in fullest else len(fullest))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(figures.get(name, '') for figures in columns.values())} |" for name in names]
    return "\n".join(lines)


def columns_of(page: str) -> dict[str, dict[str, str]]:
    """The columns of the table that the page has; the reverse of `markdown`."""
    table = page.partition(MARKS[0])[2].partition(MARKS[1])[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    if not rows:
        return {}
    (_, *labels), _, *rows = rows
    return {label: {row[0]: row[i] for row in rows if row[i]} for i, label in enumerate(labels, start=1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="columns whose title begins so")
    parser.add_argument("--no_batch_search", action="store_true")
    parser.add_argument("--write", action="store_true", help="put the table into docs/plans.md")
    options = parser.parse_args()
    chips.use_compiler()
    columns: dict[str, dict[str, str]] = {}
    for case in CASES:
        label = case.topology + (", FSDP" if "mesh.fsdp" in case.changes else "")
        if label.startswith(options.only):
            columns[label] = column(case, not options.no_batch_search)
            print(json.dumps({label: columns[label]}), file=sys.stderr, flush=True)
    if options.write:
        columns = {**columns_of(PAGE.read_text()), **columns}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    text = f"{markdown(columns)}\n\n{versions}."
    print(text)
    if options.write:
        write_between(PAGE, "table", text)


if __name__ == "__main__":
    main()
