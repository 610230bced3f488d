"""Attention within windows on eight CPU devices, run by `test_window_attention.py` in a process of its own.

Prints, as JSON, for blocks, grids and shifted blocks how far results are from those of one device, and what devices
exchange.
"""

import json
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention_mesh_job import BATCH, EXCHANGE, HEADS
from jax.sharding import NamedSharding, PartitionSpec

from attn import explain
from attn.window import window_attention
from training.distributed import mesh

SHAPE, WINDOW = (8, 6, 8, 4, 8), (3, 4)
KINDS: dict[str, dict[str, Any]] = {"block": {}, "grid": {"grid": True}, "shifted": {"shift": (1, 2)}}


def main():
    grid = mesh.create(SimpleNamespace(data=2, fsdp=2, tensor=2))
    found = {}
    for kind, how in KINDS.items():
        rng = np.random.default_rng(0)
        arrays = [jnp.asarray(rng.normal(size=SHAPE), jnp.float32) for _ in range(4)]
        arrays.append(jnp.asarray(rng.normal(size=(4, 5, 7)), jnp.float32))

        def attend(q, k, v, bias, how=how):
            return window_attention(q, k, v, window=WINDOW, bias=bias, **how)

        def step(q, k, v, d_out, bias, attend=attend):
            out, pull = jax.vjp(attend, q, k, v, bias)
            return out, *pull(d_out)

        one = jax.jit(step)(*arrays)
        heads = NamedSharding(grid, PartitionSpec(BATCH, None, None, HEADS))
        placed = [heads] * 4 + [NamedSharding(grid, PartitionSpec(HEADS))]
        program = jax.jit(mesh.under(grid, step), in_shardings=placed, out_shardings=(heads, *placed[:3], placed[4]))
        compiled = program.lower(*arrays).compile()
        eight = compiled(*(jax.device_put(array, where) for array, where in zip(arrays, placed, strict=True)))
        difference = max(float(jnp.abs(a - b).max() / jnp.abs(a).max()) for a, b in zip(one, eight, strict=True))
        exchanged = [
            [what, [int(size) for size in dims.split(",") if size]]
            for shape, what in re.findall(EXCHANGE, compiled.as_text())
            for dims in re.findall(r"\w+\[([\d,]*)\]", shape)
        ]
        share = explain(mesh.under(grid, attend), *arrays[:3], arrays[4]).calls[-1].inputs.split()[0]
        found[kind] = {"difference": difference, "exchanged": exchanged, "share": share}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
