"""The catalogue of docs/mechanisms.md: every mechanism, by what it declares.

    python -m benchmarks.mechanisms            # writes the page
    python -m benchmarks.mechanisms --check    # says whether it is up to date

Nothing in the tables is typed by hand: they are the declarations of `models/attention/`, and where a mechanism can be
put is what it itself refuses (made for 64 channels and 4 heads, with its own defaults, as shapes only).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flax import nnx

from attn import Grid
from models.attention.mechanism import Entry, Mechanism
from models.attention.registry import ATTENTION, make_attention, options_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "mechanisms.md"
PLACES: dict[str, tuple[Grid, bool, tuple[str, ...]]] = {
    "one map, class token": (Grid((14, 14), prefix=1), False, ()),
    "one map": (Grid((14, 14)), False, ()),
    "56 x 56": (Grid((56, 56)), False, ()),
    "7 x 7": (Grid((7, 7)), False, ()),
    "line": (Grid((64,)), False, ()),
    "line, causal": (Grid((64,)), False, ("causal",)),
    "video": (Grid((4, 14, 14)), False, ()),
    "memory": (Grid((14, 14)), True, ()),
}
"""Column -> grid, whether there is a memory, kinds of masks."""
SHARED = ("qkv_bias", "proj_bias", "qk_norm", "scale_norm", "norm_eps", "dropout", "init", "dtype")
HEAD = """# Mechanisms

Every mechanism that a model can have, by the name that `attention=` takes:

    models.create("vit_s16", attention="neighborhood", attention_options={"window": 7}, rngs=nnx.Rngs(0))
    python train.py --config=configs/swin_digits.py --config.model.attention=dense --workdir=runs/dense

One that does not fit where it is put is refused when the model is made, in one sentence; so is an option that it does
not have. To add one: [a mechanism](add_a_mechanism.md). `python -m benchmarks.mechanisms` writes this page from what
mechanisms declare.

"""


def made(entry: Entry, grid: Grid) -> Mechanism:
    """The mechanism as shapes only."""
    known = entry.for_grid(grid)
    return nnx.eval_shape(lambda: make_attention(entry.name, 64, 4, shared={}, options=known, rngs=nnx.Rngs(0)))


def table(columns: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def page() -> str:
    """The text."""
    entries = list(ATTENTION.values())
    about = [
        [
            f"`{one.name}`",
            one.declaration.summary,
            one.declaration.paper or "-",
            _code(one.declaration.operator),
            "heads, no projection" if one.declaration.shape == "heads" else "tokens",
        ]
        for one in entries
    ]
    costs = [[f"`{one.name}`", one.declaration.cost, _sites(one)] for one in entries]
    fits = [[f"`{one.name}`", *(_fit(one, *place) for place in PLACES.values())] for one in entries]
    options = [
        [
            f"`{one.name}`",
            ", ".join(f"`{name}`" for name in options_of(one.name) if name not in SHARED),
            ", ".join(name for name in SHARED if name in options_of(one.name)),
        ]
        for one in entries
    ]
    return (
        HEAD
        + "## What they compute\n\n"
        + table(["name", "what is mixed", "paper", "operator", "gives"], about)
        + "\n## Where they fit\n\nWith the defaults of the mechanism. *line*: a sequence; *memory*: tokens of another "
        "stream (text), perhaps of\nanother width. Sides that windows, blocks or regions do not divide may need "
        "`padding`.\n\n"
        + table(["name", *PLACES], fits)
        + "\n## What they take\n\nThe last column are options that a host says to all of them.\n\n"
        + table(["name", "own options", "shared options"], options)
        + "\n## What they cost, and what taps see\n\nMultiply-adds for one example of N tokens, C channels, H heads. "
        "Besides these sites every one has `attn.in` and `attn.out`\n([taps](taps.md)).\n\n"
        + table(["name", "multiply-adds", "sites"], costs)
    )


def _code(name: str) -> str:
    return f"`attn.{name}`" if name else "-"


def _sites(entry: Entry) -> str:
    return ", ".join(f"`{site}`" for site in entry.declaration.sites) or "-"


def _fit(entry: Entry, grid: Grid, memory: bool, masks: tuple[str, ...]) -> str:
    try:
        return "no" if made(entry, grid).refuse(grid, memory=memory, masks=masks) else "yes"
    except ValueError:
        return "no"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if not options.check:
        PAGE.write_text(page())
    elif PAGE.read_text() != page():
        print(f"{PAGE.name} is not up to date: python -m benchmarks.mechanisms writes it")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
