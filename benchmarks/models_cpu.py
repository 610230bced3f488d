"""A model's train step and inference on this CPU, beside timm with PyTorch, in one run.

    python -m benchmarks.models_cpu [--model=vit_s16] [--batch=8] [--rounds=5] [--unrolled] [--profile]
    python -m benchmarks.models_cpu --model maxvit_tiny davit_tiny volo_d1 swin_tiny --profile

Needs the extra `bench`. Both sides take turns, round by round, so that a busy machine slows both; the figure is the
ratio of the medians. Float32, images of the variant's size, two kinds of work: `infer` is a forward pass, `train` is
forward, backward and an AdamW update, with the drop path and batch statistics of training. `--profile` runs each once
more under the profiler of its side and says on which kinds of operations the time of its threads went.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import models
from benchmarks import timm_models
from models.core.registry import image_size

DROP_PATH = 0.1
Works = Mapping[str, Callable[[], Any]]
KINDS = ("convolutions", "products", "element-wise and reductions", "copies and layouts")


def ours(name: str, batch: int, *, unrolled: bool = False, dtype: Any = None) -> Works:
    """Compiled functions of this repository, each run to its end."""
    model = models.create(name, rngs=nnx.Rngs(0), scan=not unrolled, drop_path=DROP_PATH, dtype=dtype)
    graph, params, state = models.split(model)
    side = image_size(name)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((batch, side, side, 3)), jnp.float32)
    labels = jnp.arange(batch)
    tx = optax.adamw(1e-3)

    @jax.jit
    def infer(params, state, images):
        return models.merge(graph, params, state)(images)

    def loss(params, state, images, key):
        model = models.merge(graph, params, state)
        answer = model(images, train=True, key=key)
        logits = answer["logits"] if isinstance(answer, Mapping) else answer
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), models.split(model)[2]

    def update(params, state, opt_state, images, key):
        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params, state, images, key)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state, value

    step = jax.jit(update, donate_argnums=(0, 1, 2))
    carry = [*jax.tree.map(jnp.copy, (params, state)), tx.init(params)]
    key = jax.random.key(0)

    def train() -> None:
        *carry[:], value = step(*carry, images, key)
        value.block_until_ready()

    return {"infer": lambda: infer(params, state, images).block_until_ready(), "train": train}


def timms(name: str, batch: int, *, timm_name: str | None = None) -> Works:
    """The same work by timm with PyTorch. ValueError for a variant that timm does not have."""
    import torch

    theirs = timm_name or timm_models.timm_name(name)
    if theirs is None:
        raise ValueError(f"timm has no {name}")
    side = image_size(name)
    model: Any = timm_models.create(theirs, drop_path_rate=DROP_PATH, **timm_models.size_options(theirs, side))
    images = torch.randn(batch, 3, side, side)
    labels = torch.arange(batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)

    def infer() -> None:
        model.eval()
        with torch.inference_mode():
            model(images)

    def train() -> None:
        model.train()
        optimizer.zero_grad()
        answer = model(images)
        logits = answer[0] if isinstance(answer, tuple) else answer
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()

    return {"infer": infer, "train": train}


def measure(sides: Mapping[str, Works], rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds by side and work; the sides take turns."""
    times: dict[str, dict[str, list[float]]] = {side: {work: [] for work in works} for side, works in sides.items()}
    for number in range(rounds + 1):
        for side, works in sides.items():
            for work, function in works.items():
                begin = time.perf_counter()
                function()
                if number:  # the first round compiles and warms up
                    times[side][work].append(time.perf_counter() - begin)
    return {
        side: {work: 1e3 * statistics.median(values) for work, values in works.items()} for side, works in times.items()
    }


# --- where the time goes ----------------------------------------------------------------------------------------------

# Parts of the names of XLA's operations; a fusion is named after what it consists of.
_COPIES = {
    *("copy", "transpose", "concatenate", "slice", "dynamic", "update", "reshape", "bitcast", "pad", "gather"),
    *("scatter", "broadcast", "start", "done"),
}
_OURS = {"convolutions": r"conv", "products": r"dot|matmul|gemm|ynn|onednn"}
_TIMMS = {
    "convolutions": r"conv",
    "products": r"aten::(addmm|mm|bmm|baddbmm|addbmm)|scaled_dot_product|flash_attention",
    "copies and layouts": r"copy_|cat|roll|index|pad|gather|scatter|fill_|zero_|as_strided|empty",
    "element-wise and reductions": r"",
}


def kind_of_ours(operation: str) -> str:
    """The one of `KINDS` that an HLO operation is."""
    for kind, pattern in _OURS.items():
        if re.search(pattern, operation):
            return kind
    parts = set(re.findall("[a-z]+", operation)) - {"fusion", "fused", "computation", "wrapped", "clone"}
    return "copies and layouts" if parts and parts.issubset(_COPIES) else "element-wise and reductions"


def kind_of_timms(operation: str) -> str:
    """The one of `KINDS` that an operation of PyTorch is."""
    return next(kind for kind, pattern in _TIMMS.items() if re.search(pattern, operation))


def profile_ours(work: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of XLA's threads by kind of operation, in one run."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            work()
        (path,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    found: collections.Counter[str] = collections.Counter()
    for event in events:
        operation = event.get("args", {}).get("hlo_op", "")
        # Loops and calls contain what is counted by itself.
        if operation and not re.match(r"while|call|conditional", operation):
            found[kind_of_ours(operation)] += event["dur"] / 1e3
    return dict(found)


def profile_timms(work: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of PyTorch's calling thread by kind of operation, in one run."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    found: collections.Counter[str] = collections.Counter()
    for event in profiler.key_averages():
        found[kind_of_timms(event.key)] += event.self_cpu_time_total / 1e3
    return dict(found)


def report_profile(sides: Mapping[str, Works]) -> None:
    profilers = {"fovea": profile_ours, "timm": profile_timms}
    for work in sides["fovea"]:
        shares = {side: profilers[side](works[work]) for side, works in sides.items()}
        for name in KINDS:
            cells = []
            for side, found in shares.items():
                total = sum(found.values()) or 1.0
                cells.append(f"{side} {found.get(name, 0.0):7.0f} ms {found.get(name, 0.0) / total:4.0%}")
            print(f"{work:<6} {name:<28} {'   '.join(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["vit_s16"], help="variants that timm has too")
    parser.add_argument("--timm", help="timm's name of one variant, if not that of timm_models.py")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--unrolled", action="store_true", help="without scanning over blocks")
    parser.add_argument("--profile", action="store_true", help="say where the time goes")
    options = parser.parse_args()
    for name in options.model:
        sides = {
            "fovea": ours(name, options.batch, unrolled=options.unrolled),
            "timm": timms(name, options.batch, timm_name=options.timm),
        }
        found = measure(sides, options.rounds)
        ratios = {work: found["timm"][work] / found["fovea"][work] for work in found["fovea"]}
        print(f"{name}, {image_size(name)} pixels, batch {options.batch}, median of {options.rounds} rounds")
        for work, ratio in ratios.items():
            milliseconds = "   ".join(f"{side} {found[side][work]:7.0f} ms" for side in sides)
            print(f"{work:<6} {milliseconds}   timm / fovea {ratio:.2f}", flush=True)
        if options.profile:
            report_profile(sides)
        print(json.dumps({"model": name, "batch": options.batch, "ms": found, "ratio": ratios}), flush=True)


if __name__ == "__main__":
    main()
