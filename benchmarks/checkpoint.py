"""How long a save blocks the training loop.

    python benchmarks/checkpoint.py [--parameters 10000 22000000] [--repeats 5]

For each number of parameters a state as AdamW has it (parameters and two moments, float32, 150 arrays each as in a ViT
with 12 unrolled layers) is saved in one run by `orbax.checkpoint.AsyncCheckpointer` called from the loop, and by
`training.checkpoints.checkpoint`. Prints one JSON line each: the median milliseconds that the call held the loop, the
longest, the first, and the seconds until the checkpoint was complete.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.checkpoints.checkpoint import Checkpointer

ARRAYS = 150


def a_state(parameters: int) -> dict:
    size = parameters // ARRAYS
    part = {f"blocks.{i}.kernel": jax.random.normal(jax.random.key(i), (size,)) for i in range(ARRAYS)}
    copy = lambda: jax.tree.map(jnp.copy, part)  # noqa: E731
    return jax.block_until_ready({"params": part, "opt_state": {"mu": copy(), "nu": copy()}, "step": jnp.int32(1)})


def measure(save: Callable[[int], None], wait: Callable[[], None], repeats: int) -> dict[str, float]:
    blocked, complete = [], []
    for step in range(repeats + 1):
        start = time.perf_counter()
        save(step)
        blocked.append(time.perf_counter() - start)
        wait()
        complete.append(time.perf_counter() - start)
    first, later = blocked[0], blocked[1:]
    return {
        "blocked_ms": round(1e3 * statistics.median(later), 1),
        "longest_ms": round(1e3 * max(later), 1),
        "first_ms": round(1e3 * first, 1),
        "complete_s": round(statistics.median(complete[1:]), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, nargs="+", default=[10_000, 22_000_000])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    for parameters in arguments.parameters:
        state = a_state(parameters)
        megabytes = round(sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6, 1)
        with tempfile.TemporaryDirectory() as folder:
            with ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler()) as orbax:
                naive = measure(
                    lambda step: orbax.save(f"{folder}/orbax/{step}", args=ocp.args.StandardSave(state)),  # noqa: B023
                    orbax.wait_until_finished,
                    arguments.repeats,
                )
            with Checkpointer(f"{folder}/fovea", keep_last=1) as ours:
                mine = measure(lambda step: ours.save(step, state, {}), ours.wait, arguments.repeats)  # noqa: B023
        for name, row in (("orbax in the loop", naive), ("training.checkpoints.checkpoint", mine)):
            print(json.dumps({"save": name, "parameters": parameters, "state_MB": megabytes, **row}), flush=True)
        ratio = round(naive["blocked_ms"] / mine["blocked_ms"], 1)
        print(json.dumps({"ratio": ratio, "parameters": parameters}), flush=True)


if __name__ == "__main__":
    main()
