"""Routed attention on eight CPU devices, run by `test_routing.py` in a process of its own.

Prints, as JSON, for each case how far results are from those of one device, and the collectives of the program.
"""

import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from attn import explain, routed_attention
from attn.core.shards import MESH_AXES
from training.distributed import mesh

SHAPE, REGIONS, TOPK, DIM = (4, 6), (2, 3), 2, 8
BATCH, HEADS = (MESH_AXES[kind] for kind in ("batch", "heads"))
EXCHANGE = r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def attend(q, k, v, indices):
    return routed_attention(q, k, v, indices, regions=REGIONS, scale=0.5)


def mapped(q, k, v, indices):
    """Three maps of every example, routed alike."""
    return jax.vmap(attend, in_axes=(1, 1, 1, None), out_axes=1)(q, k, v, indices)


def step(function):
    """Results, and all gradients for a given cotangent."""

    def run(arrays, indices, cotangent):
        out, pull = jax.vjp(lambda arrays: function(*arrays, indices), arrays)
        return out, pull(cotangent)[0]

    return run


CASES = {  # function, batch, heads, axes between batch and map, whether results stay where they are
    "plain": (attend, 8, 4, (), True),
    "heads that are not divided": (attend, 8, 3, (), True),
    "a batch that is not divided": (attend, 6, 4, (), True),
    "mapped": (mapped, 8, 4, (3,), True),
    "whole results": (attend, 8, 4, (), False),
}


def main():
    grid = mesh.create(SimpleNamespace(data=2, fsdp=2, tensor=2))
    found = {}
    for case, (function, batch, heads, maps, stay) in CASES.items():
        rng = np.random.default_rng(0)
        shape, count = (batch, *maps, *SHAPE, heads, DIM), REGIONS[0] * REGIONS[1]
        q, k, v, cotangent = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(4))
        indices = jnp.asarray(rng.integers(0, count, (batch, count, TOPK)), jnp.int32)
        on_batch, on_heads = BATCH if batch % 4 == 0 else None, HEADS if heads % 2 == 0 else None
        placed = NamedSharding(grid, PartitionSpec(on_batch, *(None,) * (len(maps) + 2), on_heads))
        routes = NamedSharding(grid, PartitionSpec(on_batch))
        one = jax.jit(step(function))((q, k, v), indices, cotangent)

        program = jax.jit(
            mesh.under(grid, step(function)),
            in_shardings=((placed,) * 3, routes, placed),
            out_shardings=(placed if stay else mesh.replicated(grid), (placed,) * 3),
        )
        compiled = program.lower((q, k, v), indices, cotangent).compile()
        arguments = [jax.device_put(x, placed) for x in (q, k, v)], jax.device_put(indices, routes)
        eight = compiled(tuple(arguments[0]), arguments[1], jax.device_put(cotangent, placed))
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True)
        found[case] = {
            "difference": max(float(jnp.abs(a - b).max() / jnp.abs(a).max()) for a, b in pairs),
            "exchanged": re.findall(EXCHANGE, compiled.as_text()),
            "share": explain(mesh.under(grid, function), q, k, v, indices).calls[-1].inputs.split()[0],
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
