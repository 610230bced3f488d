"""Runs of several processes on the loopback device, each with some CPU devices, by the commands that a user types."""

import json
import socket
import time
from pathlib import Path

import commands
import simulated
import tiny

ROOT = Path(__file__).resolve().parent.parent
SCHEDULERS = ("SLURM_", "JAX_COORDINATOR", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JOB_COMPLETION_INDEX", "TPU_WORKER")


def free_port():
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return chosen.getsockname()[1]


def by_flags(port, processes, process):
    """Arguments and variables that make one of several processes."""
    values = {"coordinator_address": f"127.0.0.1:{port}", "num_processes": processes, "process_id": process}
    return [f"--{name}={value}" for name, value in values.items()], {}


def by_variables(port, processes, process):
    arguments, _ = by_flags(port, processes, process)
    return [], {"JAX_" + a[2:].partition("=")[0].upper(): a.partition("=")[2] for a in arguments}


def by_slurm(port, processes, process):
    return [], {
        "SLURM_JOB_ID": "1234",
        "SLURM_NTASKS": str(processes),
        "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(process),
        "SLURM_STEP_NODELIST": "localhost",
        "JAX_COORDINATOR_PORT": str(port),
    }


class Job:
    """The processes of one command.

    Args:
      arguments: of the command; more for one process in `own`, by its number.
      devices: CPU devices of each process.
      how: what tells the processes of each other.
    """

    def __init__(self, *arguments, script="train.py", processes=1, devices=1, how=by_flags, own=None):
        port = free_port()
        environment = {k: v for k, v in simulated.environment(devices).items() if not k.startswith(SCHEDULERS)}
        self.processes = []
        for i in range(processes):
            flags, variables = how(port, processes, i) if processes > 1 else ([], {})
            command = [script, *arguments, *flags, *(own or {}).get(i, [])]
            self.processes.append(commands.Child(command, environment | variables))

    def end(self, timeout=150):
        """Exit code, output and error output of every process; a run that hangs is killed, and fails."""
        deadline = time.monotonic() + timeout
        try:
            codes = [process.wait(max(deadline - time.monotonic(), 1)) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [(code, *process.communicate()) for code, process in zip(codes, self.processes, strict=True)]

    def succeed(self):
        """Output of process 0 of a run that ends well; the others say nothing."""
        (first, *others) = self.end()
        assert first[0] == 0, first
        assert others == [(0, "", "")] * len(others)
        return first[1]

    def signal(self, process, number, workdir, steps, timeout=120):
        """Sends a signal to one process as soon as the run has taken so many steps."""
        deadline = time.monotonic() + timeout
        while taken(workdir) < steps:
            assert time.monotonic() < deadline
            if any(p.poll() is not None for p in self.processes):
                raise AssertionError(f"a process ended before the moment came: {self.end(10)}")
            time.sleep(0.002)
        self.processes[process].send_signal(number)


def taken(workdir):
    """Steps noted so far by a run under way."""
    path = Path(workdir) / "examples.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saved(workdir):
    """Steps of the complete checkpoints."""
    return sorted(int(path.name) for path in Path(workdir).glob("checkpoints/*") if path.name.isdecimal())


def losses(workdir):
    return [row["loss"] for row in tiny.rows(workdir)]


def summary(workdir):
    return json.loads((Path(workdir) / "summary.json").read_text())
