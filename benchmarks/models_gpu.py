"""A model's train step and inference on an NVIDIA GPU, beside timm with compiled PyTorch, in one run.

    python -m benchmarks.models_gpu [--model vit_b16 swin_tiny] [--batch=64] [--rounds=20] [--unrolled]

Needs a GPU, `jax[cuda13]`, PyTorch for CUDA and timm. As `benchmarks.models_cpu`, but both sides compute in bfloat16
with float32 parameters (timm under autocast, by `torch.compile`), and take turns of ten steps. Prints a line of JSON
for each model and work.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timm_models
from benchmarks.models_cpu import DROP_PATH, Works, measure, ours
from models.core.registry import image_size

STEPS = 10
"""Steps between two looks at the clock."""


def timms(name: str, batch: int, compiled: bool = True) -> Works:
    """The same work by timm."""
    import torch

    theirs = timm_models.timm_name(name)
    if theirs is None:
        raise ValueError(f"timm has no {name}")
    side = image_size(name)
    made: Any = timm_models.create(theirs, drop_path_rate=DROP_PATH, **timm_models.size_options(theirs, side)).cuda()
    model = torch.compile(made) if compiled else made
    images = torch.randn(batch, 3, side, side, device="cuda")
    labels = torch.arange(batch, device="cuda")
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)

    def infer() -> None:
        made.eval()
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            model(images)

    def train() -> None:
        made.train()
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            answer = model(images)
            logits = answer[0] if isinstance(answer, tuple) else answer
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()

    def ended(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            work()
            torch.cuda.synchronize()

        return run

    return {"infer": ended(infer), "train": ended(train)}


def several(work: Callable[[], Any]) -> Callable[[], None]:
    """So many steps, one after the other."""

    def run() -> None:
        for _ in range(STEPS):
            work()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["vit_b16", "swin_tiny"], help="variants that timm has too")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--unrolled", action="store_true", help="without scanning over blocks")
    options = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too
    if jax.default_backend() != "gpu":
        print(f"a GPU is needed, JAX runs on {jax.default_backend()} here", file=sys.stderr)
        sys.exit(2)
    for name in options.model:
        sides: dict[str, Works] = {"fovea": ours(name, options.batch, unrolled=options.unrolled, dtype=jnp.bfloat16)}
        try:
            sides["timm"] = timms(name, options.batch)
        except (ImportError, ValueError) as error:
            print(f"timm is left out: {error}", file=sys.stderr)
        found = measure(
            {side: {key: several(run) for key, run in works.items()} for side, works in sides.items()}, options.rounds
        )
        for work, own in found["fovea"].items():
            theirs = found.get("timm", {}).get(work)
            print(
                json.dumps(
                    {
                        "model": name,
                        "work": work,
                        "fovea ms": own / STEPS,
                        "timm ms": theirs and theirs / STEPS,
                        "timm / fovea": theirs and theirs / own,
                        "images/s": 1e3 * STEPS * options.batch / own,
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
