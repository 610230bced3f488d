"""Every operator on an NVIDIA GPU: what runs, how far it is from the reference, and how long it takes.

    python -m benchmarks.operators_gpu [--rounds=5] [--only=window]

Needs a GPU and `jax[cuda13]`. For each operator and dtype a line of JSON: the implementation that a program lowered
for CUDA takes, the error of output and gradients over their size, `|found - true| / |true|` with the truth by
`implementation="reference"` in float32 at the highest precision, and milliseconds of forward and backward of both,
which take turns. The last line says whether every error is below what its dtype allows (float32 1e-5, bfloat16 2e-2).
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import attn

ALLOWED = {"float32": 1e-5, "bfloat16": 2e-2}
REPEATS = 10
BATCH = 32
Shapes = tuple[tuple[int, ...], ...]


def windows(**options: Any) -> tuple[Shapes, Callable[..., Any]]:
    """Swin-Tiny's first stage."""
    qkv = ((BATCH, 56, 56, 3, 32),) * 3
    return (*qkv, (3, 13, 13)), lambda q, k, v, bias, **own: attn.window_attention(
        q, k, v, window=7, bias=bias, **options, **own
    )


def neighborhood(**options: Any) -> tuple[Shapes, Callable[..., Any]]:
    """NAT-Tiny's first stage."""
    qkv = ((BATCH, 56, 56, 2, 32),) * 3
    return (*qkv, (2, 13, 13)), lambda q, k, v, bias, **own: attn.neighborhood_attention(
        q, k, v, window=7, bias=bias, **options, **own
    )


def dense(tokens: int, heads: int = 12) -> tuple[Shapes, Callable[..., Any]]:
    return ((BATCH, tokens, heads, 64),) * 3, attn.dense_attention


def outlook() -> tuple[Shapes, Callable[..., Any]]:
    """VOLO-D1's first stage."""
    return ((BATCH, 14, 14, 6, 9, 9), (BATCH, 28, 28, 6, 32)), functools.partial(
        attn.outlook_attention, window=3, stride=2, scale=32**-0.5
    )


def halo() -> tuple[Shapes, Callable[..., Any]]:
    return ((BATCH, 16, 16, 8, 16),) * 2 + ((BATCH, 16, 16, 8, 32),), functools.partial(
        attn.halo_attention, block_size=8, halo_size=2
    )


def channel() -> tuple[Shapes, Callable[..., Any]]:
    return ((BATCH, 28 * 28, 6, 32),) * 3, attn.channel_attention


CASES: dict[str, Callable[[], tuple[Shapes, Callable[..., Any]]]] = {
    "dense, ViT-B at 224": functools.partial(dense, 197),
    "dense, 1024 tokens": functools.partial(dense, 1024),
    "window": windows,
    "window, shifted": functools.partial(windows, shift=3),
    "window, grid": functools.partial(windows, grid=True),
    "neighborhood": neighborhood,
    "neighborhood, dilation 8": functools.partial(neighborhood, dilation=8),
    "outlook": outlook,
    "halo": halo,
    "channel": channel,
}


def both_ways(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Output and gradients, compiled."""

    @jax.jit
    def run(arrays: tuple[Any, ...], cotangent: Any) -> Any:
        out, pullback = jax.vjp(lambda *given: function(*given, **options), *arrays)
        return out, *pullback(cotangent)

    return run


def error(found: Any, true: Any) -> float:
    """`|found - true| / |true|`."""
    found, true = jnp.asarray(found, jnp.float32), jnp.asarray(true, jnp.float32)
    return float(jnp.linalg.norm(found - true) / jnp.linalg.norm(true))


def measure(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds; the sides take turns, the first round is not counted."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side, run in sides.items():
            begin = time.perf_counter()
            jax.block_until_ready([run() for _ in range(REPEATS)])
            if number:
                times[side].append(1e3 * (time.perf_counter() - begin) / REPEATS)
    return {side: statistics.median(found) for side, found in times.items()}


def line(name: str, dtype: str, rounds: int) -> dict[str, Any]:
    """Everything of one operator."""
    shapes, function = CASES[name]()
    keys = jax.random.split(jax.random.key(0), len(shapes) + 1)
    arrays = tuple(jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=False))
    out = jax.eval_shape(function, *arrays)
    cotangent = jax.random.normal(keys[-1], out.shape).astype(dtype)
    chosen = attn.explain(function, *arrays)["cuda"].implementation
    with jax.default_matmul_precision("highest"):
        exact = both_ways(function, implementation="reference")
        true = exact(tuple(x.astype(jnp.float32) for x in arrays), cotangent.astype(jnp.float32))
    ours, reference = both_ways(function), both_ways(function, implementation="reference")
    errors = [error(a, b) for a, b in zip(ours(arrays, cotangent), true, strict=True)]
    sides = {"ours": lambda: ours(arrays, cotangent), "reference": lambda: reference(arrays, cotangent)}
    times = measure(sides, rounds)
    return {
        "operator": name,
        "dtype": dtype,
        "runs": chosen,
        "error": max(errors),
        "ours ms": times["ours"],
        "reference ms": times["reference"],
        "reference / ours": times["reference"] / times["ours"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="only operators with this in their name")
    options = parser.parse_args()
    if jax.default_backend() != "gpu":
        print(f"a GPU is needed, JAX runs on {jax.default_backend()} here", file=sys.stderr)
        sys.exit(2)
    good = True
    for name in (name for name in CASES if options.only in name):
        for dtype in ALLOWED:
            try:
                found = line(name, dtype, options.rounds)
                good &= found["error"] < ALLOWED[dtype]
            except Exception as error:  # one that does not run shall not hide the others
                good, found = False, {"operator": name, "dtype": dtype, "failed": str(error)[:300]}
            print(json.dumps(found), flush=True)
    print(json.dumps({"all within what is allowed": good}))
    sys.exit(not good)


if __name__ == "__main__":
    main()
