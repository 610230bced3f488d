"""Neighborhood attention on eight CPU devices, run by `test_neighborhood_function.py` in a process of its own.

Prints, as JSON, for each case how far results are from those of one device, and the arrays that devices exchange.
"""

import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from attn import explain, neighborhood_attention
from attn.core.shards import MESH_AXES
from training.distributed import mesh

NAMES = ("q", "k", "v", "bias", "extra_keys", "extra_values")
SHAPE, WINDOW, DIM, EXTRA = (6, 5), (3, 4), 8, 2
BATCH, HEADS = (MESH_AXES[kind] for kind in ("batch", "heads"))
EXCHANGE = r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def attend(arrays):
    rest = {name: arrays[name] for name in NAMES[3:]}
    return neighborhood_attention(arrays["q"], arrays["k"], arrays["v"], window=WINDOW, return_lse=True, **rest)


def step(attend):
    """Results, and all gradients for given cotangents."""

    def run(arrays, cotangents):
        results, pull = jax.vjp(attend, arrays)
        return results, pull(cotangents)[0]

    return run


def layers(arrays):
    """Two layers under scan and remat, with one table of biases each."""

    def layer(q, bias):
        out, lse = attend({**arrays, "q": q, "bias": bias})
        return jnp.sin(out), lse

    policy = jax.checkpoint_policies.save_only_these_names("attention_heads", "attention_lse")
    q, lse = jax.lax.scan(jax.checkpoint(layer, policy=policy), arrays["q"], jnp.stack([arrays["bias"]] * 2))
    return q, lse[1]


def mapped(arrays):
    """Three maps of every example."""
    axes = {name: None if name in ("bias", "extra_keys", "extra_values") else 1 for name in NAMES}
    return jax.vmap(attend, in_axes=(axes,), out_axes=1)(arrays)


def inside(arrays):
    """In a shard_map over the batch that somebody else has made."""
    spec = {name: PartitionSpec() if name == "bias" else PartitionSpec(BATCH) for name in NAMES}
    out = PartitionSpec(BATCH)
    shares = jax.shard_map(attend, in_specs=(spec,), out_specs=(out, out), axis_names=set(BATCH), check_vma=False)
    return shares(arrays)


def dropped(arrays):
    """With dropout: the same probabilities are dropped on any mesh."""
    rest = {name: arrays[name] for name in NAMES[3:]}
    options = {"window": WINDOW, "return_lse": True, "dropout": 0.3, "key": jax.random.key(0)}
    return neighborhood_attention(arrays["q"], arrays["k"], arrays["v"], **options, **rest)


def layout(batch, heads, maps=()):
    """Shapes, and how they lie on the mesh; heads of keys are half of those of queries."""
    on_batch = BATCH if batch % 4 == 0 else None
    on_heads = HEADS if heads % 4 == 0 else None
    near, space = (batch, *maps, *SHAPE), (None,) * (len(maps) + 2)
    shapes = {
        "q": (*near, heads, DIM),
        "k": (*near, heads // 2, DIM),
        "v": (*near, heads // 2, DIM),
        "bias": (heads, *(2 * size - 1 for size in WINDOW)),
        "extra_keys": (batch, EXTRA, heads // 2, DIM),
        "extra_values": (batch, EXTRA, heads // 2, DIM),
    }
    specs = {name: PartitionSpec(on_batch, *space, on_heads) for name in NAMES[:3]}
    specs |= {name: PartitionSpec(on_batch, None, on_heads) for name in NAMES[4:]}
    specs["bias"] = PartitionSpec(on_heads)
    return shapes, specs


CASES = {  # function, batch, heads, axes between batch and map, whether results stay where they are
    "plain": (attend, 8, 4, (), True),
    "heads that are not divided": (attend, 8, 6, (), True),
    "a batch that is not divided": (attend, 6, 4, (), True),
    "layers": (layers, 8, 4, (), True),
    "mapped": (mapped, 8, 4, (3,), True),
    "inside": (inside, 8, 4, (), True),
    "dropped": (dropped, 8, 4, (), True),
    "dropped, heads that are not divided": (dropped, 8, 6, (), True),
    "whole results": (attend, 8, 4, (), False),
}


def main():
    grid = mesh.create(SimpleNamespace(data=2, fsdp=2, tensor=2))
    found = {}
    for case, (function, batch, heads, maps, stay) in CASES.items():
        shapes, specs = layout(batch, heads, maps)
        rng = np.random.default_rng(0)
        arrays = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
        cotangents = jnp.asarray(rng.normal(size=shapes["q"])), jnp.asarray(rng.normal(size=shapes["q"][:-1]))
        cotangents = tuple(cotangent.astype(jnp.float32) for cotangent in cotangents)
        plain = attend if function is inside else function
        one = jax.jit(step(plain))(arrays, cotangents)

        placed = {name: NamedSharding(grid, spec) for name, spec in specs.items()}
        results = (placed["q"], NamedSharding(grid, PartitionSpec(*specs["q"][: len(shapes["q"]) - 1])))
        run = mesh.under(grid, step(function))
        wanted = (results if stay else mesh.replicated(grid), placed)
        program = jax.jit(run, in_shardings=(placed, results), out_shardings=wanted)
        compiled = program.lower(arrays, cotangents).compile()
        eight = compiled(mesh.place(arrays, placed), mesh.place(cotangents, results))
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True)
        difference = max(float(jnp.abs(a - b).max() / jnp.abs(a).max()) for a, b in pairs)
        exchanged = [
            [kind, [int(size) for size in dims.split(",") if size]]
            for shape, kind in re.findall(EXCHANGE, compiled.as_text())
            for dims in re.findall(r"\w+\[([\d,]*)\]", shape)
        ]
        shares = explain(mesh.under(grid, function), arrays).calls[-1].inputs.split()[0]
        found[case] = {"difference": difference, "exchanged": exchanged, "share": shares}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
