"""The GPU kernels of neighborhood attention, compiled for H100 and A100 on a machine without a GPU: registers, spills.

    python -m benchmarks.neighborhood_gpu_compile [--gpu=h100] [--case=D64]

Needs the CUDA plugin (`pip install "jax[cuda13]"`), no GPU. One line a kernel: registers of a thread, bytes that it
spills, threads and bytes of shared memory of a block, instructions for the matrix units, and asynchronous copies into
shared memory. Float32 products must not use the matrix units, which would round their factors.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import gpus
from kernels.neighborhood import gpu, gpu_choice
from kernels.neighborhood.pattern import Pattern, make_pattern


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, of 2 examples."""

    pattern: Pattern
    dtype: Any
    head_dim: int
    heads: int = 4
    kv_heads: int = 4
    bias: bool = False
    extra: int = 0

    def arguments(self) -> list[jax.ShapeDtypeStruct | None]:
        """Shapes of q, k, v, bias, extra_keys, extra_values."""
        heads = [(2, *self.pattern.shape, heads, self.head_dim) for heads in (self.heads, self.kv_heads)]
        extra = (2, self.extra, self.kv_heads, self.head_dim)
        q, k, extras = (jax.ShapeDtypeStruct(shape, self.dtype) for shape in (*heads, extra))
        bias = jax.ShapeDtypeStruct((self.heads, *self.pattern.bias_shape), jnp.float32) if self.bias else None
        return [q, k, k, bias, extras if self.extra else None, extras if self.extra else None]


COLUMNS = ("GPU", "case", "tile", "kernel", "registers", "spills", "threads", "shared memory", "products", "copies")
MAP, VIDEO = make_pattern((56, 56), 7), make_pattern((16, 32, 32), 5)
CASES: Mapping[str, Case] = {
    "DiNAT D32 bf16, bias": Case(MAP, jnp.bfloat16, 32, bias=True),
    "DiNAT D32 bf16, bias, dilation 8": Case(make_pattern((56, 56), 7, dilation=8), jnp.bfloat16, 32, bias=True),
    "DiNAT D32 bf16, bias, 7 x 7": Case(make_pattern((7, 7), 7), jnp.bfloat16, 32, bias=True),
    "2-D D16 bf16": Case(MAP, jnp.bfloat16, 16),
    "2-D D64 bf16": Case(MAP, jnp.bfloat16, 64),
    "2-D D64 bf16, 4 extra keys, grouped": Case(MAP, jnp.bfloat16, 64, kv_heads=2, extra=4),
    "2-D D96 bf16": Case(MAP, jnp.bfloat16, 96),
    "2-D D128 bf16": Case(MAP, jnp.bfloat16, 128),
    "2-D D256 bf16": Case(MAP, jnp.bfloat16, 256),
    "2-D D64 f16": Case(MAP, jnp.float16, 64),
    "1-D D64 bf16": Case(make_pattern((16384,), 255), jnp.bfloat16, 64),
    "1-D D64 bf16, causal, stride 16": Case(make_pattern((4096,), 64, stride=16, is_causal=True), jnp.bfloat16, 64),
    "3-D D64 bf16": Case(VIDEO, jnp.bfloat16, 64),
    "2-D D32 f32, bias": Case(MAP, jnp.float32, 32, bias=True),
    "2-D D64 f32": Case(MAP, jnp.float32, 64),
    "2-D D128 f32": Case(MAP, jnp.float32, 128),
    "2-D D256 f32": Case(MAP, jnp.float32, 256),
}


def compile_case(name: str, case: Case) -> tuple[gpus.Kernel, ...]:
    """The kernels of forward and backward, compiled for the GPU of that name."""
    arguments = case.arguments()
    q, _, v = arguments[:3]
    assert q is not None
    assert v is not None
    out = jax.ShapeDtypeStruct((*q.shape[:-1], v.shape[-1]), v.dtype)
    lse = jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)
    settings = {"pattern": case.pattern, "scale": case.head_dim**-0.5}
    forward = gpus.compile_for(name, functools.partial(gpu.forward, **settings), arguments)
    backward = functools.partial(gpu.backward, **settings)
    return (*forward, *gpus.compile_for(name, backward, [*arguments, out, lse, out, lse]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=sorted(gpus.GPUS), help="default: all")
    parser.add_argument("--case", default="", help="only cases with this in their name")
    options = parser.parse_args()
    try:
        gpus.use_compiler()
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for name in [options.gpu] if options.gpu else gpus.GPUS:
        for title, case in CASES.items():
            if options.case in title:
                for kernel in compile_case(name, case):
                    if kernel.name.startswith("neighborhood_"):
                        print(f"| {name} | {title} | {' | '.join(map(str, row(case, kernel)))} |", flush=True)


def row(case: Case, kernel: gpus.Kernel) -> list[object]:
    """What the table says of a kernel."""
    size = jnp.dtype(case.dtype).itemsize
    reverse = kernel.name == "neighborhood_dkv"
    tile = gpu_choice.choose(case.pattern, case.head_dim, case.head_dim, size, reverse=reverse)
    shape = f"{' x '.join(map(str, tile.extents))} by {tile.visitors}"
    name = kernel.name.removeprefix("neighborhood_")
    return [shape, name, *dataclasses.astuple(kernel)[1:]]


if __name__ == "__main__":
    main()
