"""The table of docs/models.md: every registered model, what it costs, and how fast it is.

    python -m benchmarks.zoo [--only swin_small 'vit_*16'] [--cpu=one] [--tpu=all] [--refresh] [--print]
    python -m benchmarks.zoo --names   # the names of other projects alone, which are there at once

Parameters, multiply-adds and activation memory are traced every time, for every model, which takes minutes. What takes
longer is kept in benchmarks/zoo_figures/, so that the table is written again without measuring again:

* `--cpu`: images per second of inference on this machine beside timm's PyTorch model, the two taking turns in one run
  (extra `bench`; nothing else should run);
* `--tpu`: images per second of a train step as compiled for one chip of v5e by its own compiler (extra `plan`).

Of the models that `--only` names and that have no figures yet, `one` measures the smallest of each family, `all` every
one; `--refresh` measures again. `--print` shows the table and leaves the page as it is.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

import models
from benchmarks import timm_models
from benchmarks.pages import markdown, marks, write_between
from models.core.aliases import Meaning, names_of
from models.core.published import PUBLISHED
from models.core.registry import image_size
from models.core.summary import Cost
from models.weights.family import family_of

ROOT = Path(__file__).resolve().parent
PAGE = ROOT.parent / "docs" / "models.md"
FIGURES = ROOT / "zoo_figures"
MARKS = marks("table")
TOPOLOGY = "v5e:1x1"
CPU_BATCH, TPU_BATCH = 8, 32
Store = dict[str, dict[str, Any]]


# --- what is traced ---------------------------------------------------------------------------------------------------


@functools.cache
def abstract(name: str) -> nnx.Module:
    """The model as shapes, computing in bfloat16."""
    return nnx.eval_shape(lambda: models.create(name, dtype=jnp.bfloat16, remat="none", rngs=nnx.Rngs(0)))


@functools.cache
def cost(name: str) -> Cost:
    """Of one image of the variant's size: parameters, multiply-adds, bytes that a train step in bfloat16 keeps."""
    side = image_size(name)
    return models.summarize(abstract(name), (1, side, side, 3)).total


@functools.cache
def families(only: tuple[str, ...] = ("*",)) -> dict[str, list[str]]:
    """Variants by family, smallest first, of those whose names fit one of the patterns."""
    found: dict[str, list[str]] = {}
    for name in models.names():
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in only):
            continue
        found.setdefault(family_of(abstract(name)).name, []).append(name)
    return {family: sorted(names, key=lambda name: cost(name).multiply_adds) for family, names in sorted(found.items())}


# --- what is measured -------------------------------------------------------------------------------------------------


def read(kind: str) -> Store:
    """Kept figures by variant; `kind` is `cpu` or `v5e`."""
    path = FIGURES / f"{kind}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def keep(kind: str, name: str, found: Mapping[str, Any]) -> None:
    """Writes down what was measured of one variant, and with which versions."""
    FIGURES.mkdir(exist_ok=True)
    store = read(kind) | {name: dict(found)}
    (FIGURES / f"{kind}.json").write_text(json.dumps(dict(sorted(store.items())), indent=1) + "\n")


def versions(*packages: str) -> str:
    """`jax 0.10.2, libtpu 0.0.52`."""
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)


def measure_cpu(name: str, rounds: int = 5) -> dict[str, Any]:
    """Images per second of both sides, float32."""
    from benchmarks import models_cpu

    works = {"ours": models_cpu.ours(name, CPU_BATCH), "timm": models_cpu.timms(name, CPU_BATCH)}
    found = models_cpu.measure({side: {"infer": work["infer"]} for side, work in works.items()}, rounds)
    speeds = {side: CPU_BATCH / (1e-3 * milliseconds["infer"]) for side, milliseconds in found.items()}
    return {**speeds, "batch": CPU_BATCH, "versions": f"{versions('jax', 'torch', 'timm')}, {_processor()}"}


def measure_tpu(name: str) -> dict[str, Any]:
    """Images per second of a train step with AdamW in bfloat16, and the largest batch tried that fits."""
    import configs
    from training.plans import chips, plan  # after `use_compiler`

    batch = TPU_BATCH
    while True:
        changes = {
            "model.name": name,
            "data.name": "imagenet2012",
            "data.image_size": image_size(name),
            "data.batch_size": batch,
            "data.train_transforms": "random_resized_crop({size})|flip|normalize",
            "optim.name": "adamw",
            "train.precision": "bfloat16",
        }
        try:
            made = plan.make(configs.from_dict({}, changes), chips.parse(TOPOLOGY))
        except plan.DoesNotFit as error:
            if batch == 1:
                return {"refused": str(error), "versions": versions("jax", "libtpu")}
            batch //= 4
            continue
        return {
            "images": batch / made.step_seconds,
            "most_images": batch / made.least_seconds,
            "batch": batch,
            "versions": versions("jax", "libtpu"),
        }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(named)} x {named[0]}" if named else platform.processor()


def chosen(which: str, only: Sequence[str], kind: str, refresh: bool) -> list[str]:
    """Variants to measure. Only these are traced here, so that the first is measured at once."""
    if which == "none":
        return []
    groups: Iterable[list[str]] = families(tuple(only)).values()
    if kind == "cpu":
        groups = [[name for name in names if timm_models.timm_name(name)] for names in groups]
    picked = [name for names in groups for name in (names[:1] if which == "one" else names)]
    known = {} if refresh else read(kind)
    return [name for name in picked if name not in known]


# --- the table --------------------------------------------------------------------------------------------------------


def figures(own: Cost) -> dict[str, str]:
    """The cells that need no measurement and no gradient."""
    return {
        "parameters": f"{own.parameters:,}".replace(",", " "),
        "multiply-adds, G": f"{own.multiply_adds / 1e9:.2f}",
    }


def row(name: str, cpu: Store, tpu: Store) -> dict[str, str]:
    """One line; `-` for what is not known."""
    own, published = cost(name), PUBLISHED.get(name)
    reported = (published.multiply_adds, published.top1) if published else (None, None)
    on_cpu, on_tpu = cpu.get(name, {}), tpu.get(name, {})
    return {
        "name": f"`{name}`",
        "pixels": f"{image_size(name)}",
        **figures(own),
        "published": reported[0] or "-",
        "kept, MB": f"{own.activation_bytes / 1e6:.0f}",
        "CPU, images/s": f"{on_cpu['ours']:.1f}" if on_cpu else "-",
        "timm, images/s": f"{on_cpu['timm']:.1f}" if on_cpu else "-",
        "ours : timm": f"{on_cpu['ours'] / on_cpu['timm']:.2f}" if on_cpu else "-",
        "v5e train, images/s": f"{on_tpu['images']:.0f} (batch {on_tpu['batch']})" if "images" in on_tpu else "-",
        "top-1": reported[1] or "-",
        "note": published.note if published else "",
    }


def table() -> str:
    """All families, each under a heading, and what the figures are from."""
    cpu, tpu = read("cpu"), read("v5e")
    parts = []
    for family, names in families().items():
        rows = [row(name, cpu, tpu) for name in names]
        head = list(rows[0])
        lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += [f"| {' | '.join(one.values())} |" for one in rows]
        parts.append(f"### {family}\n\n" + "\n".join(lines))
    sources = [
        f"{what}: {'; '.join(sorted({one['versions'] for one in store.values()}))}."
        for what, store in (("CPU", cpu), (f"{TOPOLOGY}", tpu))
        if store
    ]
    return "\n\n".join([*parts, *sources])


def names_table() -> str:
    """What other projects call our variants, and what is said to a variant for it."""
    found = {variant: list(names_of(variant)) for variant in models.names()}
    sources = list(dict.fromkeys(one.source for ones in found.values() for one in ones))
    rows = [
        {"name": f"`{variant}`"}
        | {source: "<br>".join(_as_said(one) for one in ones if one.source == source) for source in sources}
        for variant, ones in found.items()
        if ones
    ]
    return markdown(rows)


def _as_said(one: Meaning) -> str:
    said = ", ".join(f"{option}={value}" for option, value in one.options.items())
    return f"`{one.name}`" + (f" ({said})" if said else "")


def rows_of(page: str) -> dict[str, dict[str, str]]:
    """Cells of a page's tables by variant and column."""
    found: dict[str, dict[str, str]] = {}
    head: list[str] = []
    for line in page.partition(MARKS[0])[2].partition(MARKS[1])[0].splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if cells and cells[0] == "name":
            head = cells
        elif cells and cells[0].startswith("`"):
            found[cells[0].strip("`")] = dict(zip(head, cells, strict=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of names to measure; the table has all")
    parser.add_argument("--cpu", choices=("none", "one", "all"), default="none")
    parser.add_argument("--tpu", choices=("none", "one", "all"), default="none")
    parser.add_argument("--refresh", action="store_true", help="measure again what has figures")
    parser.add_argument("--print", action="store_true", help="leave the page as it is")
    parser.add_argument("--names", action="store_true", help="the names of other projects alone; nothing is traced")
    options = parser.parse_args()
    if options.names:
        write_between(PAGE, "names", names_table())
        return
    if options.tpu != "none":
        from training.plans import chips

        chips.use_compiler()
    for kind, which, measured in (("cpu", options.cpu, measure_cpu), ("v5e", options.tpu, measure_tpu)):
        for name in chosen(which, options.only, kind, options.refresh):
            found = measured(name)
            keep(kind, name, found)
            print(f"{name}: {found}", file=sys.stderr, flush=True)
    text = table()
    print(text)
    if not options.print:
        write_between(PAGE, "table", text)
        write_between(PAGE, "names", names_table())


if __name__ == "__main__":
    main()
