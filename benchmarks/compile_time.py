"""Compile time of a train step by depth: flat where blocks are scanned.

    python -m benchmarks.compile_time [--width=192] [--unrolled]

Prints seconds to trace and lower and to compile, for ViTs of depth 12, 24 and 48.
"""

from __future__ import annotations

import argparse
import json
import time

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import models


def seconds(depth: int, width: int, scan: bool) -> dict[str, float]:
    """Time to lower and to compile one train step, nothing taken from a cache."""
    model = nnx.eval_shape(
        lambda: models.create(
            "vit_ti16",
            rngs=nnx.Rngs(0),
            depth=depth,
            width=width,
            heads=width // 64,
            mlp_width=4 * width,
            drop_path=0.1,
            scan=scan,
        )
    )
    graph, params, state = models.split(model)
    tx = optax.adamw(1e-3)

    def step(params, opt_state, images, labels, key):
        def loss(params):
            logits = models.merge(graph, params, state)(images, train=True, key=key)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    shapes = (
        params,
        jax.eval_shape(tx.init, params),
        jax.ShapeDtypeStruct((8, 224, 224, 3), jnp.float32),
        jax.ShapeDtypeStruct((8,), jnp.int32),
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    begin = time.perf_counter()
    lowered = jax.jit(step).lower(*shapes)
    middle = time.perf_counter()
    lowered.compile()
    return {"lower": round(middle - begin, 2), "compile": round(time.perf_counter() - middle, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--unrolled", action="store_true")
    options = parser.parse_args()
    seconds(12, options.width, not options.unrolled)  # warms up the compiler itself
    found = {depth: seconds(depth, options.width, not options.unrolled) for depth in (12, 24, 48)}
    for depth, row in found.items():
        print(f"depth {depth:2}: lower {row['lower']:6.2f} s   compile {row['compile']:6.2f} s")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
