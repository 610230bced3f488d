"""A ViT's train step and inference on this CPU, beside timm with PyTorch, in one run.

    python -m benchmarks.vit_cpu [--model=vit_s16] [--batch=8] [--rounds=5] [--unrolled]

Needs the extra `bench`. Both sides take turns, round by round, so that a busy machine slows both; the figure is the
ratio of the medians. Float32, two kinds of work: `infer` is a forward pass, `train` is forward, backward and an AdamW
update.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import importlib.util
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import models

TIMM = {"vit_ti16": "vit_tiny_patch16_224", "vit_s16": "vit_small_patch16_224", "vit_b16": "vit_base_patch16_224"}


class _NoTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for torchvision, which has no CPU build everywhere and which these models do not use."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None
        )

    def create_module(self, spec: Any) -> types.ModuleType:
        class Anything(types.ModuleType):
            def __getattr__(self, name: str) -> Any:
                if name.startswith("__"):
                    raise AttributeError(name)
                return type(
                    name,
                    (),
                    {
                        "__getattr__": lambda _, __: None,
                        "BICUBIC": 3,
                        "BILINEAR": 2,
                        "NEAREST": 0,
                        "BOX": 4,
                        "HAMMING": 5,
                        "LANCZOS": 1,
                    },
                )

        return Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []


def ours(name: str, batch: int, unrolled: bool) -> dict[str, Callable[[], Any]]:
    """Compiled functions of this repository, each run to its end."""
    model = models.create(name, rngs=nnx.Rngs(0), scan=not unrolled)
    graph, params, state = models.split(model)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((batch, 224, 224, 3)), jnp.float32)
    labels = jnp.arange(batch)
    tx = optax.adamw(1e-3)

    @jax.jit
    def infer(params, images):
        return models.merge(graph, params, state)(images)

    def loss(params, images):
        logits = models.merge(graph, params, state)(images, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def update(params, opt_state, images):
        value, grads = jax.value_and_grad(loss)(params, images)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    step = jax.jit(update, donate_argnums=(0, 1))
    carry = [jax.tree.map(jnp.copy, params), tx.init(params)]

    def train() -> None:
        *carry[:], value = step(*carry, images)
        value.block_until_ready()

    return {"infer": lambda: infer(params, images).block_until_ready(), "train": train}


def timms(name: str, batch: int) -> dict[str, Callable[[], Any]]:
    """The same work by timm with PyTorch."""
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.insert(0, _NoTorchvision())
    import timm
    import torch

    model = timm.create_model(TIMM[name])
    images = torch.randn(batch, 3, 224, 224)
    labels = torch.arange(batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)

    def infer() -> None:
        model.eval()
        with torch.inference_mode():
            model(images)

    def train() -> None:
        model.train()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return {"infer": infer, "train": train}


def measure(sides: dict[str, dict[str, Callable[[], Any]]], rounds: int) -> dict[str, dict[str, float]]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_s16", choices=sorted(TIMM))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--unrolled", action="store_true", help="without scanning over blocks")
    options = parser.parse_args()
    sides = {"fovea": ours(options.model, options.batch, options.unrolled), "timm": timms(options.model, options.batch)}
    found = measure(sides, options.rounds)
    ratios = {work: found["timm"][work] / found["fovea"][work] for work in found["fovea"]}
    print(f"{options.model}, batch {options.batch}, median of {options.rounds} rounds")
    for work, ratio in ratios.items():
        print(
            f"{work:<6} fovea {found['fovea'][work]:7.0f} ms   timm {found['timm'][work]:7.0f} ms   timm / fovea "
            f"{ratio:.2f}"
        )
    print(json.dumps({"model": options.model, "batch": options.batch, "ms": found, "ratio": ratios}))


if __name__ == "__main__":
    main()
