"""Programs for platforms that this machine does not have, lowered but not compiled."""

import contextlib

import jax

# Some rules of lowering ask which device it is for.
DEVICES = {
    "tpu": jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu"),
    "cuda": jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"),
}


def device(platform):
    """A context in which there is one device of the platform."""
    if platform not in DEVICES:
        return contextlib.nullcontext()
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), axis_types=auto, abstract_device=DEVICES[platform])
    return jax.sharding.use_abstract_mesh(mesh)


def lowered(function, platform, *inputs):
    """The text of a function's program."""
    with device(platform):
        return jax.jit(function).trace(*inputs).lower(lowering_platforms=(platform,)).as_text()
