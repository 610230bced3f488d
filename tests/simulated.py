"""Child processes in which a CPU stands for several devices."""

import json
import os
import re

import commands
import quick

from training.run import command


def environment(devices, **more):
    """The variables of this process and `more`, for a child with `devices` CPU devices."""
    flags = f"{quick.flags()} --xla_force_host_platform_device_count={devices}"
    variables = {**os.environ, "XLA_FLAGS": flags, **more}
    command.give_threads(variables)
    return variables


def run(devices, script, *arguments):
    """What a script of `tests/`, or a text of one, prints on so many devices: JSON or nothing."""
    done = commands.run([script, *arguments], environment(devices), 300)
    assert done.returncode == 0, done.stderr[-3000:]
    told = commands.told(done.stdout)
    return json.loads(told) if re.match(r"\s*[\[{]", told) else told
