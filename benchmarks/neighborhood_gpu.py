"""Neighborhood attention on a GPU beside PyTorch's FlexAttention with the same pattern and cuDNN's dense attention.

    python -m benchmarks.neighborhood_gpu [--rounds=20] [--case=56x56]

Needs an NVIDIA GPU, `jax[cuda13]`, and PyTorch for CUDA (without it FlexAttention is left out). bf16, no bias. All
sides take turns in one process. FlexAttention gets the best of two block sizes and of two orders of the tokens
(row-major, and tiles of a dilation group one after the other); putting them in order is not counted.

Aims: 1.5 times as fast as FlexAttention; over dense attention, 60% of the gain that the simulator says our tiles can
have.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn import neighborhood_attention
from kernels.neighborhood import gpu_choice, simulator
from kernels.neighborhood.pattern import Pattern, make_pattern

REPEATS = 20
"""Calls between two looks at the clock."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem."""

    shape: tuple[int, ...]
    window: int
    dilation: int = 1
    heads: int = 4
    head_dim: int = 32
    batch: int = 64

    @property
    def name(self) -> str:
        """What the table calls it."""
        size = "x".join(map(str, self.shape))
        return f"{size} window {self.window} dilation {self.dilation}, {self.heads} heads of {self.head_dim}"

    @property
    def pattern(self) -> Pattern:
        """Who sees whom."""
        return make_pattern(self.shape, self.window, dilation=self.dilation)


# DiNAT-Tiny's stages (arXiv:2209.15001, table 1), local and with their largest dilation, then larger heads and maps.
CASES = (
    Case((56, 56), 7, heads=2),
    Case((56, 56), 7, dilation=8, heads=2),
    Case((28, 28), 7, heads=4),
    Case((28, 28), 7, dilation=4, heads=4),
    Case((14, 14), 7, heads=8),
    Case((14, 14), 7, dilation=2, heads=8),
    Case((7, 7), 7, heads=16),
    Case((64, 64), 13, head_dim=64, batch=8),
    Case((128, 128), 7, head_dim=128, batch=4),
    Case((16384,), 255, head_dim=64, batch=2),
    Case((16, 32, 32), 5, head_dim=64, batch=1),
)


def tiled_order(pattern: Pattern, extents: Sequence[int]) -> np.ndarray:
    """All tokens, one tile of one dilation group after the other."""
    runs = []
    for axis, extent in zip(pattern.axes, extents, strict=True):
        groups = [np.arange(group, axis.length, axis.dilation) for group in range(axis.dilation)]
        runs.append([group[begin : begin + extent] for group in groups for begin in range(0, len(group), extent)])
    tiles = (np.meshgrid(*tile, indexing="ij") for tile in itertools.product(*runs))
    return np.concatenate([np.ravel_multi_index(tile, pattern.shape).ravel() for tile in tiles])


def mask_function(
    pattern: Pattern, order: np.ndarray, to_array: Callable[[np.ndarray], Any] = np.asarray
) -> Callable[[Any, Any, Any, Any], Any]:
    """FlexAttention's `mask_mod(batch, head, query, key)` of a pattern, for tokens in this order."""
    tables = []
    for axis, coordinate in zip(pattern.axes, np.unravel_index(order, pattern.shape), strict=True):
        first, end = axis.interval(coordinate)
        columns = (coordinate % axis.dilation, coordinate // axis.dilation, first, end)
        tables.append([to_array(column.astype(np.int32)) for column in columns])

    def mask(batch: Any, head: Any, query: Any, key: Any) -> Any:
        seen = query >= 0
        for group, member, first, end in tables:
            seen = seen & (group[query] == group[key]) & (member[key] >= first[query]) & (member[key] < end[query])
        return seen

    return mask


def ours(case: Case) -> dict[str, Callable[[], Any]]:
    """Forward, and forward with backward, ready to be called."""
    shape = (case.batch, *case.shape, case.heads, case.head_dim)
    q, k, v, cotangent = jax.random.normal(jax.random.key(0), (4, *shape), jnp.bfloat16)

    def attend(q: Any, k: Any, v: Any) -> Any:
        return neighborhood_attention(q, k, v, window=case.window, dilation=case.dilation, implementation="gpu")

    return _jax_side(attend, (q, k, v), cotangent)


def dense(case: Case) -> dict[str, Callable[[], Any]]:
    """cuDNN's attention between all tokens: what a neighborhood costs that is not used."""
    shape = (case.batch, case.pattern.tokens, case.heads, case.head_dim)
    q, k, v, cotangent = jax.random.normal(jax.random.key(0), (4, *shape), jnp.bfloat16)
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    return _jax_side(attend, (q, k, v), cotangent)


def _jax_side(attend: Callable, arrays: tuple[Any, ...], cotangent: Any) -> dict[str, Callable[[], Any]]:
    forward = jax.jit(attend)

    @jax.jit
    def both(arrays: tuple[Any, ...], cotangent: Any) -> Any:
        out, pullback = jax.vjp(attend, *arrays)
        return out, pullback(cotangent)

    return {
        "forward": lambda: jax.block_until_ready([forward(*arrays) for _ in range(REPEATS)]),
        "forward + backward": lambda: jax.block_until_ready([both(arrays, cotangent) for _ in range(REPEATS)]),
    }


def flex(case: Case) -> Iterator[dict[str, Callable[[], Any]]]:
    """FlexAttention for each block size and order of the tokens."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    shape = (case.batch, case.heads, case.pattern.tokens, case.head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    cotangent = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    torch.compiler.reset()  # of too many programs PyTorch compiles no more, and runs what is not compiled
    attend = torch.compile(flex_attention)
    extents = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}[len(case.shape)]
    for order in (np.arange(case.pattern.tokens), tiled_order(case.pattern, extents)):
        mask = mask_function(case.pattern, order, lambda column: torch.from_numpy(column).cuda())
        for block in (64, 128):
            tokens = case.pattern.tokens
            blocks = create_block_mask(mask, None, None, tokens, tokens, device="cuda", BLOCK_SIZE=block)

            def forward(blocks: Any = blocks) -> None:
                with torch.no_grad():
                    for _ in range(REPEATS):
                        attend(q, k, v, block_mask=blocks)
                torch.cuda.synchronize()

            def both(blocks: Any = blocks) -> None:
                for _ in range(REPEATS):
                    torch.autograd.grad(attend(q, k, v, block_mask=blocks), (q, k, v), cotangent)
                torch.cuda.synchronize()

            yield {"forward": forward, "forward + backward": both}


def measure(sides: dict[str, dict[str, Callable[[], Any]]], rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of a call, by side and work; the sides take turns, and the first round is not counted."""
    times: dict[str, dict[str, list[float]]] = {side: {work: [] for work in works} for side, works in sides.items()}
    for number in range(rounds + 1):
        for side, works in sides.items():
            for work, function in works.items():
                begin = time.perf_counter()
                function()
                if number:
                    times[side][work].append(1e3 * (time.perf_counter() - begin) / REPEATS)
    return {side: {work: statistics.median(found) for work, found in works.items()} for side, works in times.items()}


def compare(found: dict[str, dict[str, float]], case: Case, work: str) -> dict[str, Any]:
    """One line of the table: times and ratios of one work; the best of the FlexAttention sides counts."""
    own, all_keys = found["ours"][work], found["dense"][work]
    peers = [times[work] for side, times in found.items() if side.startswith("flex")]
    tile = gpu_choice.choose(case.pattern, case.head_dim, case.head_dim, 2)
    possible = simulator.simulate(case.pattern, tile.extents).gain
    return {
        "case": case.name,
        "work": work,
        "ours ms": own,
        "flex ms": min(peers, default=None),
        "cudnn dense ms": all_keys,
        "times flex": min(peers) / own if peers else None,
        "times dense": all_keys / own,
        "share of the possible gain": all_keys / own / possible,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--case", default="", help="only cases with this in their name")
    options = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too
    if jax.default_backend() != "gpu":
        print(f"a GPU is needed, JAX runs on {jax.default_backend()} here", file=sys.stderr)
        sys.exit(2)
    for case in (case for case in CASES if options.case in case.name):
        sides = {"ours": ours(case), "dense": dense(case)}
        if importlib.util.find_spec("torch"):
            sides |= {f"flex {number}": works for number, works in enumerate(flex(case))}
        found = measure(sides, options.rounds)
        for work in ("forward", "forward + backward"):
            print(json.dumps(compare(found, case, work)), flush=True)


if __name__ == "__main__":
    main()
