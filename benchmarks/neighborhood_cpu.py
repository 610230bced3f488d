"""Neighborhood attention on this CPU beside what else computes it, in one run: time and memory.

    python -m benchmarks.neighborhood_cpu [--rounds=5] [--cases=dinat_56 ...] [--without-torch] [--memory-only]

Sides: the XLA path; unfold-and-gather (the reference implementation: every query gathers its keys); PyTorch's
FlexAttention with the same pattern as a block mask, compiled by `torch.compile` (extra `bench`, and a C++ compiler).
They take turns, round by round; figures are medians, and ratios of them to the XLA path's. Memory is what a compiled
program of XLA takes beside its arguments and results; the dense column is attention between all tokens with a mask.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn import dense_attention
from attn.neighborhood import reference, xla
from kernels.neighborhood.pattern import Pattern, make_pattern

WORKS = ("forward", "forward + backward")


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem in float32."""

    pattern: Pattern
    batch: int
    heads: int
    head_dim: int

    @property
    def scale(self) -> float:
        """Of the logits."""
        return self.head_dim**-0.5

    @property
    def shape(self) -> tuple[int, ...]:
        """Of q, k, v."""
        return (self.batch, *self.pattern.shape, self.heads, self.head_dim)


# The maps of DiNAT-Tiny at 224 pixels with their larger dilations, and maps of the other ranks.
CASES = {
    "dinat_56": Case(make_pattern((56, 56), 7), 4, 2, 32),
    "dinat_56_dilated": Case(make_pattern((56, 56), 7, dilation=8), 4, 2, 32),
    "dinat_28": Case(make_pattern((28, 28), 7), 4, 4, 32),
    "dinat_14": Case(make_pattern((14, 14), 7, dilation=2), 4, 8, 32),
    "dinat_7": Case(make_pattern((7, 7), 7), 4, 16, 32),
    "map_64": Case(make_pattern((64, 64), 7), 1, 4, 64),
    "sequence": Case(make_pattern((4096,), 255), 1, 4, 64),
    "video": Case(make_pattern((8, 16, 16), 5), 1, 4, 64),
}


def with_gradient(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Output and the gradients of q, k, v for the cotangent that comes last."""

    def run(q: Any, k: Any, v: Any, d_out: Any) -> Any:
        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(d_out)

    return run


def ours(case: Case, implementation: Any) -> dict[str, Callable[..., Any]]:
    """One of the implementations of this repository, not compiled yet."""
    options = {"pattern": case.pattern, "scale": case.scale}

    def forward(q: Any, k: Any, v: Any, d_out: Any) -> Any:
        return implementation.forward(q, k, v, None, None, None, **options)[0]

    def both(q: Any, k: Any, v: Any, d_out: Any) -> Any:
        arrays = (q, k, v, None, None, None)
        out, lse = implementation.forward(*arrays, **options)
        return out, *implementation.backward(*arrays, out, lse, d_out, None, **options)[:3]

    return dict(zip(WORKS, (forward, both), strict=True))


def masked(case: Case) -> dict[str, Callable[..., Any]]:
    """Attention between all tokens with a mask."""
    mask = jnp.asarray(case.pattern.mask())

    def attend(q: Any, k: Any, v: Any) -> Any:
        flat = (array.reshape(case.batch, -1, case.heads, case.head_dim) for array in (q, k, v))
        return dense_attention(*flat, mask=mask, scale=case.scale).reshape(v.shape)

    return dict(zip(WORKS, (lambda q, k, v, d_out: attend(q, k, v), with_gradient(attend)), strict=True))


def flex(case: Case) -> dict[str, Callable[[], Any]]:
    """PyTorch's FlexAttention, ready to run. It wants heads before tokens, and gets them so.

    On CPUs it has no backward pass (torch 2.13 raises NotImplementedError for arguments that want a gradient).
    """
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = torch.from_numpy(case.pattern.mask())
    tokens = case.pattern.tokens
    blocks = create_block_mask(lambda b, h, i, j: mask[i, j], None, None, tokens, tokens, device="cpu")
    compiled = torch.compile(flex_attention)
    shape = (case.batch, case.heads, tokens, case.head_dim)
    q, k, v = (torch.randn(shape) for _ in range(3))

    def forward() -> None:
        compiled(q, k, v, block_mask=blocks, scale=case.scale)

    return {"forward": forward}


def programs(case: Case, works: dict[str, Callable[..., Any]]) -> dict[str, Any]:
    """Compiled by XLA."""
    arguments = [jax.ShapeDtypeStruct(case.shape, jnp.float32)] * 4
    return {work: jax.jit(function).lower(*arguments).compile() for work, function in works.items()}


def runnable(case: Case, compiled: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    random = np.random.default_rng(0)
    arrays = [jnp.asarray(random.standard_normal(case.shape), jnp.float32) for _ in range(4)]
    return {work: functools.partial(_finish, program, arrays) for work, program in compiled.items()}


def _finish(program: Any, arrays: list[Any]) -> None:
    jax.block_until_ready(program(*arrays))


def medians(sides: dict[str, dict[str, Callable[[], Any]]], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds by side and work."""
    times: dict[str, dict[str, list[float]]] = {side: {work: [] for work in works} for side, works in sides.items()}
    for number in range(rounds + 1):
        for side, works in sides.items():
            for work, function in works.items():
                begin = time.perf_counter()
                function()
                if number:  # the first round compiles and warms up
                    times[side][work].append(1e3 * (time.perf_counter() - begin))
    return {side: {work: statistics.median(values) for work, values in works.items()} for side, works in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--without-torch", action="store_true")
    parser.add_argument("--memory-only", action="store_true")
    options = parser.parse_args()
    print("| case | work | XLA path, ms | gather / it | FlexAttention / it | XLA path, MB | gather / it | dense / it |")
    print("|---" * 8 + "|")
    for name in options.cases:
        case = CASES[name]
        compiled = {
            side: programs(case, works)
            for side, works in {
                "xla": ours(case, xla),
                "gather": ours(case, reference),
                "dense": masked(case),
            }.items()
        }
        memory = {
            side: {work: program.memory_analysis().temp_size_in_bytes for work, program in works.items()}
            for side, works in compiled.items()
        }
        sides: dict[str, dict[str, Callable[[], Any]]] = {}
        if not options.memory_only:
            sides = {side: runnable(case, compiled[side]) for side in ("xla", "gather")}
            if not options.without_torch:
                sides["flex"] = flex(case)
        times = medians(sides, options.rounds)
        for work in WORKS:
            milliseconds = {side: times.get(side, {}).get(work, math.nan) for side in ("xla", "gather", "flex")}
            cells = [name, work, f"{milliseconds['xla']:.1f}"]
            cells += [f"{milliseconds[side] / milliseconds['xla']:.1f}" for side in ("gather", "flex")]
            cells += [f"{memory['xla'][work] / 2**20:.1f}"]
            cells += [f"{memory[side][work] / memory['xla'][work]:.1f}" for side in ("gather", "dense")]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
