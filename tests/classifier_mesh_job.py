"""A classifier and a linear layer in bfloat16 on eight CPU devices, run by `test_classifier.py` in its own process.

Prints, as JSON, for both how far value and gradients are from those of one device, their dtypes, and how often the
program has what a mesh adds to it.
"""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from flax import nnx

import models
from models.layers.linear import Head, Linear
from training.distributed import mesh

NORMAL = jax.nn.initializers.normal(1.0)


class Model(nnx.Module):
    """One layer, whose parameters have names with a dot, as those that are spread over a mesh have."""

    def __init__(self, head):
        self.head = head


def wide(value):
    return value.astype(jnp.float32)


def main():
    grid = mesh.create(SimpleNamespace(data=2, fsdp=4, tensor=1))
    x = jax.random.normal(jax.random.key(0), (16, 32)).astype(jnp.bfloat16)
    found = {}
    for kind in (Head, Linear):
        layer = kind(32, 64, kernel_init=NORMAL, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        graph, params, state = models.split(Model(layer))

        def loss(params, x, graph=graph, state=state):
            return jnp.sin(wide(models.merge(graph, params, state).head(x)) / 8).sum()

        step = jax.value_and_grad(loss, (0, 1))
        one = jax.jit(step)(params, x)
        arguments = mesh.tree_shardings(params, {}, grid), mesh.batch_sharding(grid)
        program = jax.jit(mesh.under(grid, step), in_shardings=arguments)
        eight = program(*mesh.place((params, x), arguments))
        text = program.lower(params, x).as_text()
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(jax.device_get(eight)), strict=True)
        found[kind.__name__] = {
            "difference": max(float(jnp.abs(wide(a) - wide(b)).max() / jnp.abs(wide(a)).max()) for a, b in pairs),
            "dtypes": [str(value.dtype) for value in jax.tree.leaves(eight)],
            "kernel": str(arguments[0]["head.kernel"].spec),
            "constraints": text.count("sharding_constraint"),
            "barriers": text.count("optimization_barrier"),
            "products": text.count("stablehlo.dot_general"),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
