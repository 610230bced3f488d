"""CPU seconds to trace and lower the gradient of a model, beside those with one implementation forced.

    python -m benchmarks.tracing [--model swin_tiny nat_tiny maxvit_tiny volo_d1 biformer_tiny]

Which implementation runs is chosen where a program is lowered (`attn/core/lowering.py`), so a model whose operators may
choose costs about what one costs that may not. Each is measured in a process of its own, after a model of another size
has warmed JAX up, and nothing is compiled. Prints a line of JSON for each model: seconds to trace and to lower, the
size of the program in MB, the same for the forced one, and the ratio of the sums.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FORCED = {
    "swin_tiny": "windows",
    "maxvit_tiny": "windows",
    "nat_tiny": "xla",
    "volo_d1": None,
    "biformer_tiny": None,
}
"""Model -> the implementation of its mechanism; None where there is more than one mechanism, which is only measured."""


def cpu_seconds() -> float:
    """User and system time of this process since it began."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(name: str, implementation: str | None) -> dict[str, Any]:
    """Seconds of one model, in this process."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import models

    def lowered(side: int) -> dict[str, Any]:
        own: dict[str, Any] = {"attention_options": {"implementation": implementation}} if implementation else {}
        model = nnx.eval_shape(lambda: models.create(name, rngs=nnx.Rngs(0), image_size=side, **own))
        graph, params, state = models.split(model)
        images = jax.ShapeDtypeStruct((8, side, side, 3), jnp.float32)

        def loss(params: Any, state: Any, images: Any) -> Any:
            return models.merge(graph, params, state)(images).sum()

        begin = cpu_seconds()
        traced = jax.jit(jax.grad(loss)).trace(params, state, images)
        middle = cpu_seconds()
        text = traced.lower().as_text()
        end = cpu_seconds()
        return {"trace": round(middle - begin, 2), "lower": round(end - middle, 2), "MB": round(len(text) / 1e6, 2)}

    lowered(448)
    return lowered(224)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(FORCED))
    parser.add_argument("--here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here is not None:
        print(json.dumps(measure(options.model[0], options.here or None)))
        return

    def apart(name: str, implementation: str | None) -> dict[str, Any]:
        command = [sys.executable, "-m", "benchmarks.tracing", "--model", name, "--here", implementation or ""]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    for name in options.model:
        found = {"model": name, **apart(name, None)}
        if forced := FORCED.get(name):
            other = apart(name, forced)
            ratio = (found["trace"] + found["lower"]) / (other["trace"] + other["lower"])
            found |= {"forced": forced, **{f"forced {key}": value for key, value in other.items()}}
            found["ratio"] = round(ratio, 2)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
