"""Who this process is: what flags, environment variables and schedulers say about the processes of a run."""

from __future__ import annotations

import dataclasses
import glob
import re
from collections.abc import Callable, Mapping
from pathlib import Path

# flag, environment variable
ADDRESS = ("--coordinator_address", "JAX_COORDINATOR_ADDRESS")
PROCESSES = ("--num_processes", "JAX_NUM_PROCESSES")
PROCESS = ("--process_id", "JAX_PROCESS_ID")
FLAGS = (ADDRESS, PROCESSES, PROCESS)

TPU_PORT = 8482  # where the coordinator of JAX usually listens on TPU machines
FIRST_SLURM_PORT, SLURM_PORTS = 61440, 4096  # ports that job numbers are folded into
GOOGLE = "0x1ae0"  # vendor number of PCI devices
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
METADATA_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Launch:
    """Who this process is.

    Attributes:
      address: `HOST:PORT` of process 0, which the others have to reach; empty if there are none.
      processes: how many there are.
      process: which one this is, from 0.
      why: where that comes from, for people.
    """

    address: str = ""
    processes: int = 1
    process: int = 0
    why: str = "nothing says that there are others"


def decide(
    environment: Mapping[str, str],
    flags: Mapping[str, str | None],
    tpu_metadata: Callable[[str], str] | None = None,
) -> Launch:
    """What is known about this process. Flags count before variables, and both before what a scheduler says.

    Args:
      flags: values of `FLAGS` by flag; None where not given.
      tpu_metadata: on a Cloud TPU machine, gives an attribute of it by name, empty if there is none.

    Raises:
      ValueError: something is missing or makes no sense; the message names the flag or variable.
    """
    given = {}
    for flag, variable in FLAGS:
        if value := flags.get(flag):
            given[flag] = (flag, value)
        elif value := environment.get(variable):
            given[flag] = (variable, value)
    scheduled = _gke(environment) or _slurm(environment)
    if given:
        return _given(given, environment, scheduled)
    if scheduled is None and tpu_metadata is not None:
        scheduled = _cloud_tpu(tpu_metadata)
    return scheduled or Launch()


def _given(given: Mapping[str, tuple[str, str]], environment: Mapping[str, str], scheduled: Launch | None) -> Launch:
    """What was said explicitly, as `{flag: (flag or variable, value)}`; a scheduler may complete it."""
    known = dict(given)
    if index := environment.get("JOB_COMPLETION_INDEX"):  # of a pod of an Indexed Job in Kubernetes
        known.setdefault(PROCESS[0], ("JOB_COMPLETION_INDEX", index))
    if scheduled is not None and scheduled.processes > 1:
        values = (scheduled.address, str(scheduled.processes), str(scheduled.process))
        for (flag, _), value in zip(FLAGS, values, strict=True):
            known.setdefault(flag, (scheduled.why, value))
    why = ", ".join(name for name, _ in given.values())
    if PROCESSES[0] in known and _number(*known[PROCESSES[0]], least=1) == 1:
        return Launch(why=why)
    for flag, variable in FLAGS:
        if flag not in known:
            name, value = next(iter(given.values()))
            raise ValueError(f"{name}={value}: {flag} (or {variable}) is missing")
    processes, process = _number(*known[PROCESSES[0]], least=1), _number(*known[PROCESS[0]], least=0)
    if process >= processes:
        raise ValueError(f"{known[PROCESS[0]][0]}={process}: must be below {known[PROCESSES[0]][0]}={processes}")
    name, address = known[ADDRESS[0]]
    found = re.fullmatch(r"\S+:(\d+)", address)
    if not found or not 0 < int(found[1]) < 65536:
        raise ValueError(f"{name}={address}: must be HOST:PORT, such as 10.0.0.1:{TPU_PORT}")
    return Launch(address, processes, process, why)


def _gke(environment: Mapping[str, str]) -> Launch | None:
    """A TPU pod of Google Kubernetes Engine, which gives it these variables."""
    hosts, worker = environment.get("TPU_WORKER_HOSTNAMES"), environment.get("TPU_WORKER_ID")
    return _slices("GKE, TPU_WORKER_ID", hosts, worker, environment) if hosts and worker else None


def _cloud_tpu(metadata: Callable[[str], str]) -> Launch | None:
    """A Cloud TPU machine, which learns of its slice from a server.

    `worker-network-endpoints` holds a name, or `name:number:address`, for each machine of the slice; `tpu-env` lines
    such as `KEY: 'value'`.
    """
    endpoints = metadata("worker-network-endpoints")
    if not endpoints:
        return None
    hosts = ",".join(endpoint.split(":")[-1] for endpoint in endpoints.split(","))
    variables = dict(re.findall(r"(?m)^(\w+): *'?([^'\n]*)", metadata("tpu-env")))
    return _slices("Cloud TPU, metadata", hosts, metadata("agent-worker-number"), variables)


def _slices(why: str, hosts: str, worker: str, environment: Mapping[str, str]) -> Launch:
    """Numbers the machines of all slices, slice after slice; `MEGASCALE_*` variables describe the slices."""
    names = hosts.split(",")
    slices = _number("MEGASCALE_NUM_SLICES", environment.get("MEGASCALE_NUM_SLICES") or "1", least=1)
    this_slice = _number("MEGASCALE_SLICE_ID", environment.get("MEGASCALE_SLICE_ID") or "0", least=0)
    this_worker = _number("TPU_WORKER_ID", worker, least=0)
    if this_worker >= len(names) or this_slice >= slices:
        raise ValueError(f"TPU_WORKER_ID={worker} of slice {this_slice}: there are {slices} x {len(names)} workers")
    if slices * len(names) == 1:
        return Launch(why=f"{why}: one machine")
    first = (environment.get("MEGASCALE_COORDINATOR_ADDRESS") or names[0]).split(":")[0]
    process = this_slice * len(names) + this_worker
    return Launch(f"{first}:{_port(environment, TPU_PORT)}", slices * len(names), process, why)


def _slurm(environment: Mapping[str, str]) -> Launch | None:
    """A task that srun started. A shell in an allocation has no SLURM_PROCID, or is the only task of its step."""
    job, task = environment.get("SLURM_JOB_ID"), environment.get("SLURM_PROCID")
    if not (job and task):
        return None
    count = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or "1"
    processes, process = _number("SLURM_NTASKS", count, least=1), _number("SLURM_PROCID", task, least=0)
    if processes == 1:
        return Launch(why="SLURM: one task")
    if process >= processes:
        raise ValueError(f"SLURM_PROCID={process}: must be below SLURM_NTASKS={processes}")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise ValueError(f"SLURM_NTASKS={processes}: SLURM_STEP_NODELIST is missing; start the processes with srun")
    port = _port(environment, FIRST_SLURM_PORT + _number("SLURM_JOB_ID", job, least=0) % SLURM_PORTS)
    return Launch(f"{first_node(nodes)}:{port}", processes, process, "SLURM, SLURM_PROCID")


def first_node(nodes: str) -> str:
    """The first name of a SLURM node list: `node007` of `node[007-9,12],other`.

    Raises:
      ValueError: the list has no name.
    """
    found = re.match(r"([^,\[]+)(?:\[([^-,\]]+))?", nodes)
    if not found:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes}: no name of a node")
    return found[1] + (found[2] or "")


def _port(environment: Mapping[str, str], usual: int) -> int:
    return _number("JAX_COORDINATOR_PORT", environment.get("JAX_COORDINATOR_PORT") or str(usual), least=1)


def _number(name: str, text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name}={text}: must be a whole number, at least {least}")
    return int(text)


def has_tpu() -> bool:
    """Whether this machine has a TPU: a PCI device of Google and a node of a driver that TPUs use."""
    vendors = (Path(file).read_text().strip() for file in glob.glob("/sys/bus/pci/devices/*/vendor"))
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")) and GOOGLE in vendors


def tpu_metadata(name: str) -> str:
    """An attribute of a Cloud TPU machine; empty if it does not have it."""
    import urllib.error
    import urllib.request

    request = urllib.request.Request(METADATA + name, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=METADATA_SECONDS) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, TimeoutError):
        return ""
