"""Several processes as one run: connecting them before JAX touches a device, and what they have to agree on.

A run of one process starts nothing. `train.py` and `eval.py` call `start` through `training.run.command`.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from errors import ProcessMissing
from training.distributed import launch as launches
from training.distributed.launch import Launch

if TYPE_CHECKING:
    from training.distributed.lifeline import Lifeline

START_TIMEOUT, LOST_AFTER = 300.0, 60.0  # seconds
SHARED_SECONDS = 60.0  # within which a network file system shows a new file to other machines

_launch = Launch()  # of this process, once started
_lifeline: Lifeline | None = None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `start` reads."""
    group = parser.add_argument_group("several processes", "found by itself on Cloud TPU, GKE and SLURM (docs/pods.md)")
    meanings = (
        ("HOST:PORT", "where process 0 listens"),
        ("N", "how many processes the run has"),
        ("I", "which one this is, from 0"),
    )
    for (flag, variable), (value, meaning) in zip(launches.FLAGS, meanings, strict=True):
        group.add_argument(flag, metavar=value, help=f"{meaning} (or {variable})")
    times = (
        ("--start_timeout", START_TIMEOUT, "seconds to wait until all processes are there"),
        ("--lost_after", LOST_AFTER, "seconds without a sign of life after which a process is lost"),
    )
    for flag, usual, meaning in times:
        group.add_argument(flag, type=float, default=usual, metavar="S", help=f"{meaning}; default: {usual:g}")


def expected(options: argparse.Namespace) -> Launch:
    """Who this process will be, from the flags of `add_flags` and what the machine says; connects nothing.

    Raises:
      ValueError: flags or variables make no sense.
    """
    flags = {flag: getattr(options, flag.removeprefix("--")) for flag, _ in launches.FLAGS}
    return launches.decide(os.environ, flags, launches.tpu_metadata if launches.has_tpu() else None)


def start(options: argparse.Namespace, given: Mapping[str, Any] | None = None) -> Launch:
    """Connects this process with the others of its run, before JAX touches a device; a single one starts nothing.

    Args:
      options: the flags of `add_flags`.
      given: what the command was given, by name: all processes have to have the same.

    Raises:
      ValueError: flags or variables make no sense, or the processes disagree on them, on what they were given, or on
        the code and the packages that they run.
      ProcessMissing: the processes did not find each other in time.
    """
    global _launch, _lifeline
    for name in ("start_timeout", "lost_after"):
        if not 0 < getattr(options, name) < math.inf:
            raise ValueError(f"--{name}={getattr(options, name):g}: must be a positive number of seconds")
    launch = expected(options)
    if launch.processes == 1:
        return launch
    import jax

    from training.distributed.facts import facts
    from training.distributed.lifeline import Lifeline

    # JAX talks to the loopback device, and gRPC would ask a proxy for it.
    without_proxy = [name for name in (os.environ.get("no_grpc_proxy"), "127.0.0.1") if name]  # noqa: SIM112
    os.environ["no_grpc_proxy"] = ",".join(without_proxy)  # noqa: SIM112
    # It would take SIGTERM away from `training.distributed.preemption`, which agrees with the other processes by the
    # lifeline.
    jax.config.update("jax_enable_preemption_service", False)
    lifeline = Lifeline(launch, options.lost_after, facts(given or {}))
    jax.distributed.initialize(
        lifeline.open(options.start_timeout),
        launch.processes,
        launch.process,
        cluster_detection_method="deactivate",
        # The lifeline is quicker than JAX's own watch, and has words for it.
        heartbeat_timeout_seconds=math.ceil(10 * options.lost_after) + 100,
    )
    _launch, _lifeline = launch, lifeline
    return launch


def is_first() -> bool:
    """Whether this process speaks for the run: it writes to the terminal and to shared files."""
    return _launch.process == 0


def connection() -> Lifeline | None:
    """The connection with the other processes; None for a single one."""
    return _lifeline


def finish() -> None:
    """Waits for the other processes to be done too, so that none takes the end of this one for a loss."""
    global _lifeline
    if _lifeline is not None:
        _lifeline.close()
        _lifeline = None


def await_loss(error: Exception) -> None:
    """Returns if `error` is this process's own.

    When a process dies, what the others compute with it breaks, in words that depend on the network library; the
    lifeline ends them with better ones, a moment later.
    """
    if _lifeline is not None:
        import jax

        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            _lifeline.await_news()


def failed(text: str, code: int, report: str, others: int | None = None) -> None:
    """Writes the report of an error to stderr; one of several processes tells the others, and ends here.

    Args:
      text: the error in one line.
      code: what to leave with; the others do with `others`, if it is another one.
    """
    if _lifeline is not None:
        _lifeline.fail(text, code, report, others)
    print(report, file=sys.stderr)


def check_shared(folder: Path, name: str) -> None:
    """Refuses a folder that is not the same one for all processes; all of them call this.

    Args:
      name: what the message calls the folder.

    Raises:
      ValueError: some process does not see what process 0 writes there.
    """
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return
    mark = folder / f".shared-{multihost_utils.broadcast_one_to_all(np.int32(os.getpid()))}"
    if jax.process_index() == 0:
        mark.touch()
    multihost_utils.sync_global_devices("shared folder marked")
    sees = multihost_utils.process_allgather(np.bool_(_appears(mark)))
    if jax.process_index() == 0:
        mark.unlink()
    if not sees.all():
        raise ValueError(
            f"{name}: process {np.argmin(sees)} does not see there what process 0 writes; it has to be one folder that "
            "all machines reach, on a shared file system or a mounted bucket"
        )


def _appears(mark: Path) -> bool:
    deadline = time.monotonic() + SHARED_SECONDS
    while mark.name not in os.listdir(mark.parent):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def first_says(value: bool) -> bool:
    """What process 0 says, in all of them; all of them call this."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(value)))


def agree(value: int, what: str) -> None:
    """Refuses a number that is not the same in all processes; all of them call this.

    Raises:
      ProcessMissing: some process has another number: files that one wrote are not there yet for another.
    """
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        found = np.unique(multihost_utils.process_allgather(np.int32(value)))
        if len(found) > 1:
            raise ProcessMissing(f"the processes see different {what}: {', '.join(map(str, found))}")


def total(value: int) -> int:
    """The sum over all processes; all of them call this."""
    import jax
    from jax.experimental import multihost_utils

    return int(np.sum(multihost_utils.process_allgather(np.int32(value)))) if jax.process_count() > 1 else value
