"""The tiny model of one family in training on eight CPU devices and on one, run by `test_contract.py` in a process of
its own: `contract_mesh_job.py FAMILY`.

Prints, as JSON, how far loss and new batch statistics are from each other.
"""

import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import tiny_models

import models
from models.core import sharding
from training.distributed import mesh


def largest(one, eight):
    """The largest difference, relative to the largest number of each array."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True)
    return max((float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(a).max(), 1e-3)) for a, b in pairs), default=0.0)


def main(family):
    side = tiny_models.TINY[family][1]["image_size"]
    model = tiny_models.create(family)
    graph, params, state = models.split(model)
    # Unlike examples, so that no part of the batch has the statistics of the whole.
    images = tiny_models.images(side, side, batch=8) * jnp.linspace(0.2, 2.0, 8)[:, None, None, None]

    def loss(params, state, images):
        model = models.merge(graph, params, state)
        answer = model(images, train=True, key=jax.random.key(2))
        total = sum(jnp.sin(value).mean() for value in jax.tree.leaves(answer))
        return total, models.split(model)[2]

    value, statistics = jax.jit(loss)(params, state, images)

    grid = mesh.create(SimpleNamespace(data=4, fsdp=2, tensor=1))
    rules = sharding.rules(model)
    placed = [mesh.tree_shardings(flat, rules, grid) for flat in (params, state)]
    arguments = (*placed, mesh.batch_sharding(grid))
    run = jax.jit(mesh.under(grid, loss), in_shardings=arguments, out_shardings=(mesh.replicated(grid), placed[1]))
    other, moved = run(*mesh.place((params, state, images), arguments))
    found = {
        "devices": grid.size,
        "loss": largest(value, other),
        "statistics": largest(statistics, jax.device_get(moved)),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
