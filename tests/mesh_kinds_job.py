"""A model under every kind of mesh, run by `tests/models/test_calls.py` in a process of its own with four CPU devices.

Prints, as JSON, how far logits and gradients are from those without a mesh, and what is said of explicit axes.
"""

import json

import jax
import jax.numpy as jnp
import tiny_models
from jax.sharding import AxisType, PartitionSpec


def main():
    images = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    found = {}
    for family in ("vit", "swin"):
        model = tiny_models.create(family)
        plain, gradient = model(images), jax.grad(lambda x, model=model: model(x).sum())(images)

        def far(value, expected):
            return float(jnp.abs(value - expected).max())

        with jax.set_mesh(jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)):
            found[f"{family} eager"] = far(model(images), plain)
            for name, axes in (("partly", {"data"}), ("wholly", {"data", "tensor"})):
                specs = {"in_specs": PartitionSpec("data"), "out_specs": PartitionSpec("data"), "axis_names": axes}
                run = jax.shard_map(lambda x, model=model: model(x), **specs)
                found[f"{family} {name} manual"] = far(jax.jit(run)(images), plain)
                own = jax.jit(jax.grad(lambda x, run=run: run(x).sum()))(images)
                found[f"{family} {name} manual, gradient"] = far(own, gradient)
        with jax.set_mesh(jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)):
            try:
                model(images)
            except ValueError as error:
                found[f"{family} explicit"] = str(error).splitlines()[0]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
