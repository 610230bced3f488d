"""Dense attention on TPUs, splash attention beside XLA: from which length `attn.dense_attention` takes the first.

    python -m benchmarks.dense_tpu [--chip=v5e] [--head_dim=64] [--heads=12] [LENGTH ...]

Cycles by the TPU's compiler (`benchmarks/tpu_cycles.py`), bf16, one example, from packed projections to a packed
output, every copy on the way counted. The backward pass runs as in training without rematerialization.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
from jaxtyping import Array, Float

from attn import dense_attention
from benchmarks import tpu_cycles

Packed = Float[Array, "B N HD"]


def packed(q: Packed, k: Packed, v: Packed, *cotangents: Packed, heads: int, implementation: str) -> tuple[Any, ...]:
    """The output, and where there is a cotangent the gradients."""

    def attend(*arrays: Array) -> Array:
        split = [array.reshape(*array.shape[:-1], heads, -1) for array in arrays]
        return dense_attention(*split, implementation=implementation).reshape(arrays[0].shape)

    if not cotangents:
        return (attend(q, k, v),)
    out, pull = jax.vjp(attend, q, k, v)
    return (out, *pull(cotangents[0]))


def main() -> None:
    """Prints a row for each length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lengths", nargs="*", type=int, default=[197, 1024, 2048, 4096], metavar="LENGTH")
    parser.add_argument("--chip", default="v5e", choices=tpu_cycles.TOPOLOGIES)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--heads", type=int, default=12)
    given = parser.parse_args()
    print(f"thousand cycles on {given.chip}, {given.heads} heads of {given.head_dim}")
    print("| tokens | pass | xla | splash | xla : splash |\n|---|---|---|---|---|")
    for length in given.lengths:
        array = f"bf16[1,{length},{given.heads * given.head_dim}]"
        for name, number in (("forward", 3), ("forward + backward", 4)):
            figures = []
            for implementation in ("xla", "splash"):
                options = {"heads": given.heads, "implementation": implementation}
                report = tpu_cycles.measure(
                    "benchmarks.dense_tpu:packed", *[array] * number, chip=given.chip, **options
                )
                figures.append(report.figure / 1e3)
            xla, splash = figures
            print(f"| {length} | {name} | {xla:.0f} | {splash:.0f} | {xla / splash:.2f} |", flush=True)


if __name__ == "__main__":
    main()
