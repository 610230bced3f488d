"""Every operator in meshes that others have made, on four CPU devices, run by `test_operators.py` in a process of its
own.

Prints, as JSON, for each operator how far results and gradients are from those of one device, in a `shard_map` over the
axis of the batch alone, how far results are without `jit` under `jax.set_mesh`, and what is said under explicit axes.
"""

import json

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from operators import BATCH, CASES

AXES = ("data", "tensor")


def difference(one, other):
    pairs = zip(jax.tree.leaves(jax.device_get(one)), jax.tree.leaves(jax.device_get(other)), strict=True)
    return max(float(abs(a - b).max() / max(1.0, abs(a).max())) for a, b in pairs)


def main():
    kinds = (AxisType.Auto, AxisType.Explicit)
    auto, explicit = (jax.make_mesh((2, 2), AXES, axis_types=(kind,) * 2) for kind in kinds)
    found = {}
    for name, case in CASES.items():
        fixed = {key: jnp.asarray(value) for key, value in case.fixed(BATCH).items()}
        arrays = (*case.arrays(), *fixed.values())
        count = len(case.shapes)

        def run(*inputs, case=case, fixed=fixed, count=count):
            return case.attend(*inputs[:count], **dict(zip(fixed, inputs[count:], strict=True)))

        def both(run, count=count):
            def loss(*inputs):
                out = run(*inputs)
                return jnp.sum(jnp.sin(out)), out

            return jax.value_and_grad(loss, tuple(range(count)), has_aux=True)

        split = PartitionSpec("data")
        specs = tuple(PartitionSpec() if name in case.whole else split for name in (*case.shapes, *fixed))
        shares = jax.shard_map(run, mesh=auto, in_specs=specs, out_specs=split, axis_names={"data"})
        one = jax.jit(both(run))(*arrays)
        inside = difference(one, jax.jit(both(shares))(*arrays))
        with jax.set_mesh(auto):
            eager = difference(one[0][1], run(*arrays))
        try:
            with jax.set_mesh(explicit):
                said = str(jax.eval_shape(run, *arrays))
        except ValueError as error:
            said = str(error)
        found[name] = {"inside": inside, "eager": eager, "said": said}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
