"""Child processes in which a CPU stands for several devices."""

import os

from training.run import command


def environment(devices, **more):
    """The variables of this process and `more`, for a child with `devices` CPU devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    variables = {**os.environ, "XLA_FLAGS": flags, **more}
    command.give_threads(variables)
    return variables
