"""Does every family learn? Its small configuration and the same model without attention, over several seeds.

    python -m benchmarks.learning [--set=digits] [--seeds=3] [--only=swin] [--runs=runs/learning] [--jobs=1] [--write]

Trains every `configs/*_digits.py` and the quickstart by the real command, once with its own attention and once with
`--config.model.attention=identity`, which mixes no tokens, so that what is left are convolutions and pooling. What the
runs' summaries say is kept in `benchmarks/learning.json`, and a run of the same configuration that is there is not run
again. `--write` makes docs/results.md of it, and no figure of that page is typed. Run it in a clean checkout: a summary
names its commit.
`--set=fashion` trains the same models on Fashion-MNIST, from Debian's package `dataset-fashion-mnist`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

import configs
import models
from benchmarks.pages import markdown
from models.core.summary import Cost

ROOT = Path(__file__).resolve().parent.parent
STORE = ROOT / "benchmarks" / "learning.json"
PAGE = ROOT / "docs" / "results.md"
REFERENCE = "vit_digits"
CONTROL = "identity"
TEXT = """# Results: does every family learn?

Small models of every family, each trained by its own configuration, and the same model with its attention replaced by
`identity`, which mixes no tokens. This page is written by

    python -m benchmarks.learning --seeds=3 --write
    python -m benchmarks.learning --set=fashion --seeds=2 --write

from the summaries of the runs (`benchmarks/learning.json`); no figure is typed. Top-1 in percent after the last step,
of the averaged weights. Seeds are 0, 1, 2 in this order.

{sections}

## What the control says

Digits are small: stems, downsampling and convolutions for positions see a good part of one without any attention, so
*attention gives* says how much a mechanism adds to what is around it, not how good it is. For this reason the small
DaViT and MaxViT take images of 64 pixels and have no convolutions of 3 x 3 in their layers, the latter no
squeeze-excite either, and the small Swin cuts 24 pixels into patches of 2: what a place of their last stage sees
without attention is a third of a digit across at most. Where the difference is small, nothing of the mechanism is
needed: a ViT's learned positions make its control a linear model of patches, and the quickstart's overlapping
convolutions see 15 of a digit's 16 pixels.

Fashion-MNIST is learned in two epochs, by the digits' recipes and at their sizes: short runs of equal length, far from
what these models would reach.
"""
SECTION = """## {title}

{table}

Not told from their controls, of which a seed is as good as one of the model: {level}.

A run is, for instance, `{example}`. Commits: {commits}. Versions: {versions}.
"""


class DataSet(NamedTuple):
    """A set that the models learn; `changes` are made to every configuration."""

    data: str
    title: str
    changes: Mapping[str, str]


FASHION = "idx:/usr/share/datasets/fashion-mnist"
SETS = {
    "digits": DataSet(
        "digits", "scikit-learn's digits: 1,442 to learn from, 355 held out, so one image is 0.28 points", {}
    ),
    "fashion": DataSet(
        FASHION,
        "Fashion-MNIST: 60,000 images to learn from, 10,000 held out, 2 epochs",
        # More steps from as many images than with the digits' batch of 128; ten thousand are evaluated once.
        {"data.name": FASHION, "data.batch_size": "64", "train.steps": "2 epochs", "eval.every_steps": "0"},
    ),
}
KEPT = ("seed", "commit", "parameters", "model", "data", "versions", "finished", "config_hash")


def names() -> list[str]:
    """The configurations that are compared, that of the ViT first."""
    found = sorted(path.stem for path in (ROOT / "configs").glob("*_digits.py") if path.stem != REFERENCE)
    return [REFERENCE, "quickstart", *found]


def command(name: str, attention: str, seed: int, workdir: str, data_set: str = "digits") -> list[str]:
    """What a user types, as the words after `python`."""
    changes = dict(SETS[data_set].changes) | ({"model.attention": attention} if attention else {})
    words = [f"--config.{key}={value}" for key, value in changes.items()]
    return ["train.py", f"--config=configs/{name}.py", f"--workdir={workdir}", f"--config.seed={seed}", *words]


def train(name: str, attention: str, seed: int, folder: Path, data_set: str) -> dict[str, Any]:
    """One run: what its summary says, and the command."""
    workdir = folder / data_set / f"{name}_{attention or 'own'}_{seed}"
    done = subprocess.run(
        [sys.executable, *command(name, attention, seed, str(workdir), data_set)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{workdir.name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    summary = json.loads((workdir / "summary.json").read_text())
    top1 = next(iter(summary["metrics"].values()))["top1"]
    print(f"{workdir.name}: {top1:.4f}", file=sys.stderr, flush=True)
    return {
        "config": name,
        "attention": attention,
        "top1": top1,
        "command": shlex.join(
            ["python", *command(name, attention, seed, f"runs/learning/{data_set}/{workdir.name}", data_set)]
        ),
    } | {key: summary[key] for key in KEPT}


def is_known(store: Sequence[Mapping[str, Any]], name: str, attention: str, seed: int, data_set: str) -> bool:
    """Whether the store has this run, of the configuration as it is now."""
    words = command(name, attention, seed, "", data_set)
    path, overrides, _ = configs.split_arguments(words[1:])
    digest = configs.digest(configs.load(str(ROOT / str(path)), overrides))
    return any(
        (run["config"], run["attention"], run["seed"], run["config_hash"]) == (name, attention, seed, digest)
        for run in store
    )


def accuracies(name: str, attention: str, runs: Sequence[Mapping[str, Any]]) -> list[float]:
    """In percent, by seed."""
    mine = [run for run in runs if run["config"] == name and run["attention"] == attention]
    return [100 * run["top1"] for run in sorted(mine, key=lambda run: run["seed"])]


def cost(name: str) -> Cost:
    """Parameters of the model, and what one image takes forward."""
    config = configs.load(str(ROOT / "configs" / f"{name}.py"))
    options = {**config.model.options, "image_size": config.data.image_size}
    model = nnx.eval_shape(lambda: models.create(config.model.name, num_classes=10, rngs=nnx.Rngs(0), **options))
    side = config.data.image_size
    return models.summarize(model, (1, side, side, 3), activations=False).total


def row(name: str, runs: Sequence[Mapping[str, Any]], reference: float) -> dict[str, str]:
    """One line of the table: accuracy in percent, differences in points."""
    own, control = (accuracies(name, attention, runs) for attention in ("", CONTROL))
    total = cost(name)
    mean = statistics.mean(own)
    return {
        "config": f"`{name}.py`",
        "parameters": f"{total.parameters:,}",
        "multiply-adds, M": f"{total.multiply_adds / 1e6:.1f}",
        "top-1 by seed": ", ".join(f"{one:.2f}" for one in own),
        "mean": f"{mean:.2f}",
        "less the ViT": f"{mean - reference:+.2f}",
        "identity by seed": ", ".join(f"{one:.2f}" for one in control),
        "attention gives": f"{mean - statistics.mean(control):+.2f}" if control else "",
    }


def section(title: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """The table of one set."""
    there = [name for name in names() if any(run["config"] == name and not run["attention"] for run in runs)]
    reference = statistics.mean(accuracies(REFERENCE, "", runs))
    level = [
        f"`{name}.py`"
        for name in there
        if min(accuracies(name, "", runs)) <= max(accuracies(name, CONTROL, runs), default=0.0)
    ]
    commits = sorted({run["commit"][:8] + run["commit"][40:] for run in runs})
    return SECTION.format(
        title=title,
        level=", ".join(level) or "none",
        table=markdown([row(name, runs, reference) for name in there]),
        example=runs[0]["command"],
        commits=", ".join(commits),
        versions=", ".join(f"{name} {version}" for name, version in runs[0]["versions"].items()),
    )


def page(runs: Sequence[Mapping[str, Any]]) -> str:
    """docs/results.md, with the sets that have runs."""
    of_sets = [(one.title, [run for run in runs if run["data"] == one.data]) for one in SETS.values()]
    return TEXT.format(sections="\n".join(section(title, some) for title, some in of_sets if some).rstrip("\n"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, default="digits", help="what the models learn")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="part of a configuration's name")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "learning", help="where the runs are kept")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--write", action="store_true", help="write docs/results.md")
    options = parser.parse_args()
    store: list[dict[str, Any]] = json.loads(STORE.read_text()) if STORE.exists() else []
    wanted = [
        (name, attention, seed)
        for seed in range(options.seeds)
        for name in names()
        if options.only in name
        for attention in ("", CONTROL)
        if not is_known(store, name, attention, seed, options.set)
    ]
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        started = [
            pool.submit(train, name, attention, seed, options.runs, options.set) for name, attention, seed in wanted
        ]
        new = [job.result() for job in started]
    # Not before the last run has started: the store is under version control, and a run says whether its tree is clean.
    # A run that was complete when this was interrupted is read from its folder the next time.
    key = ("data", "config", "attention", "seed")
    known = {tuple(run[name] for name in key): run for run in (*store, *new)}
    store = [known[one] for one in sorted(known)]
    STORE.write_text(json.dumps(store, indent=1) + "\n")
    if options.write:
        PAGE.write_text(page(store))


if __name__ == "__main__":
    main()
