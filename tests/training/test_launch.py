"""What schedulers, variables and flags say about a process, as a table; and whether the manifests say it."""

import argparse
import subprocess
import sys
import threading

import jax
import pytest
import simulated

from training.distributed import launch, processes
from training.distributed.launch import decide
from training.run import command

SLURM = {
    "SLURM_JOB_ID": "70001",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_STEP_NODELIST": "node[007-010]",
}
GKE = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a-0.svc,a-1.svc"}
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "a-0.svc:8080"}
FLAGS = {"--coordinator_address": "h:1", "--num_processes": "2", "--process_id": "1"}
VARIABLES = {"JAX_COORDINATOR_ADDRESS": "v:2", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "0"}
INDEXED = {"JOB_COMPLETION_INDEX": "5", "JAX_COORDINATOR_ADDRESS": "train-0.train:1234", "JAX_NUM_PROCESSES": "8"}


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("name", "environment", "flags", "expected"),
    [
        ("one machine", {}, {}, ("", 1, 0)),
        ("flags", {}, FLAGS, ("h:1", 2, 1)),
        ("variables", VARIABLES, {}, ("v:2", 3, 0)),
        ("flags before variables", VARIABLES, FLAGS, ("h:1", 2, 1)),
        ("flags and variables", VARIABLES, {"--process_id": "2"}, ("v:2", 3, 2)),
        ("one process", {}, {**FLAGS, "--num_processes": "1", "--process_id": "0"}, ("", 1, 0)),
        ("one process is enough to say", SLURM, {"--num_processes": "1"}, ("", 1, 0)),
        ("Indexed Job", INDEXED, {}, ("train-0.train:1234", 8, 5)),
        ("an index alone is no run of several", {"JOB_COMPLETION_INDEX": "5"}, {}, ("", 1, 0)),
        ("srun", SLURM, {}, ("node007:61809", 4, 2)),
        ("srun, port", {**SLURM, "JAX_COORDINATOR_PORT": "99"}, {}, ("node007:99", 4, 2)),
        ("srun, address", SLURM, {"--coordinator_address": "eth0:5"}, ("eth0:5", 4, 2)),
        ("srun, part of a job", {**SLURM, "SLURM_STEP_NUM_TASKS": "3"}, {}, ("node007:61809", 3, 2)),
        ("srun, one task", {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {}, ("", 1, 0)),
        ("shell of salloc", {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n1"}, {}, ("", 1, 0)),
        (
            "interactive step",
            {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
            {},
            ("", 1, 0),
        ),
        ("GKE", GKE, {}, ("a-0.svc:8482", 2, 1)),
        ("GKE, one host", {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}, {}, ("", 1, 0)),
        ("GKE, two slices", {**GKE, **SLICES}, {}, ("a-0.svc:8482", 4, 3)),
        ("GKE before SLURM", {**SLURM, **GKE}, {}, ("a-0.svc:8482", 2, 1)),
    ],
)
def test_decide(name, environment, flags, expected):
    found = decide(environment, flags)
    assert (found.address, found.processes, found.process) == expected
    assert found.why


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({}, ("", 1, 0)),
        ({"worker-network-endpoints": "x:0:10.0.0.5", "agent-worker-number": "0"}, ("", 1, 0)),
        (
            {"worker-network-endpoints": "x:0:10.0.0.5,x:1:10.0.0.6", "agent-worker-number": "1"},
            ("10.0.0.5:8482", 2, 1),
        ),
        ({"worker-network-endpoints": "t-0,t-1,t-2", "agent-worker-number": "2"}, ("t-0:8482", 3, 2)),
        (
            {
                "worker-network-endpoints": "10.0.1.5,10.0.1.6",
                "agent-worker-number": "0",
                "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
                "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.5'\n",
            },
            ("10.0.0.5:8482", 4, 2),
        ),
    ],
)
def test_a_cloud_tpu_machine_knows_its_slice(attributes, expected):
    found = decide({}, {}, lambda name: attributes.get(name, ""))
    assert (found.address, found.processes, found.process) == expected


def test_the_metadata_server_is_asked_only_where_nothing_else_is_known():
    def ask(name):
        raise AssertionError(name)

    for environment, flags in (({}, FLAGS), (VARIABLES, {}), (SLURM, {}), (GKE, {})):
        assert decide(environment, flags, ask).processes > 1


@pytest.mark.parametrize(
    ("environment", "flags", "message"),
    [
        ({}, {"--num_processes": "2"}, r"--num_processes=2: --coordinator_address \(or JAX_COOR.*\) is missing"),
        ({}, FLAGS | {"--num_processes": None}, r"--coordinator_address=h:1: --num_processes .* is missing"),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            {},
            r"JAX_NUM_PROCESSES=2: --coordinator_address \(or JAX_COORDINATOR_ADDRESS\) is missing",
        ),
        ({}, {**FLAGS, "--process_id": "2"}, "--process_id=2: must be below --num_processes=2"),
        ({}, {**FLAGS, "--process_id": "-1"}, "--process_id=-1: must be a whole number, at least 0"),
        ({}, {**FLAGS, "--num_processes": "two"}, "--num_processes=two: must be a whole number, at least 1"),
        ({}, {**FLAGS, "--num_processes": "0"}, "--num_processes=0: must be a whole number, at least 1"),
        ({}, {**FLAGS, "--coordinator_address": "host"}, "--coordinator_address=host: must be HOST:PORT"),
        ({}, {**FLAGS, "--coordinator_address": "host:99999"}, "--coordinator_address=host:99999: must be HOST:PORT"),
        (INDEXED | {"JOB_COMPLETION_INDEX": "8"}, {}, "JOB_COMPLETION_INDEX=8: must be below JAX_NUM_PROCESSES=8"),
        (SLURM | {"SLURM_PROCID": "4"}, {}, "SLURM_PROCID=4: must be below SLURM_NTASKS=4"),
        (SLURM | {"SLURM_STEP_NODELIST": ""}, {}, "SLURM_NTASKS=4: SLURM_STEP_NODELIST is missing; .* with srun"),
        (GKE | {"TPU_WORKER_ID": "2"}, {}, "TPU_WORKER_ID=2 of slice 0: there are 1 x 2 workers"),
    ],
)
def test_what_makes_no_sense_is_named(environment, flags, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        decide(environment, flags)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,node2", "node001"),
        ("node[001-015],other", "node001"),
        ("node[001,007-015]", "node001"),
        ("a-b[3]", "a-b3"),
    ],
)
def test_first_node(nodes, first):
    assert launch.first_node(nodes) == first


def test_a_machine_without_accelerator_does_not_look_for_a_tpu(monkeypatch):
    """With libtpu installed (the extra `plan`) JAX would."""
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: name)
    monkeypatch.delitem(command.sys.modules, "jax", raising=False)
    monkeypatch.setattr(command, "GPU_NODES", ())
    monkeypatch.setattr(launch, "has_tpu", lambda: False)
    for name in ("JAX_PLATFORMS", "TPU_NAME", "TPU_WORKER_ID", "JAX_FORCE_TPU_INIT"):
        monkeypatch.delenv(name, raising=False)
    assert command.only_cpu()
    with monkeypatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "tpu")
        assert not command.only_cpu()
    with monkeypatch.context() as patch:
        patch.setenv("TPU_WORKER_ID", "0")
        assert not command.only_cpu()
    with monkeypatch.context() as patch:
        patch.setattr(launch, "has_tpu", lambda: True)
        assert not command.only_cpu()
    with monkeypatch.context() as patch:
        patch.setattr(command, "GPU_NODES", ("null",))  # there is a /dev/null
        assert not command.only_cpu()
    with monkeypatch.context() as patch:
        patch.setattr(command.importlib.util, "find_spec", lambda name: None)
        assert not command.only_cpu()


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, None),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}, None),
        ({"XLA_FLAGS": "--a --xla_force_host_platform_device_count=800 --b"}, "6400"),
        ({"JAX_NUM_CPU_DEVICES": "800"}, "6400"),
        ({"JAX_NUM_CPU_DEVICES": "800", "PJRT_NPROC": "3"}, "3"),
    ],
)
def test_a_cpu_that_stands_for_several_devices_gets_more_threads(variables, threads):
    command.give_threads(variables)
    assert variables.get("PJRT_NPROC") == threads


@pytest.mark.smoke
def test_xla_takes_the_threads_that_it_is_given():
    """The variable is XLA's own, and written down nowhere: a newer one may have another name for it."""
    script = "import jax, os; jax.device_put(1.0).block_until_ready(); print(len(os.listdir('/proc/self/task')))"
    few, many = (
        int(
            subprocess.run(
                [sys.executable, "-c", script],
                env=simulated.environment(4, PJRT_NPROC=str(number)),
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for number in (4, 40)
    )
    assert many - few >= 36


def test_a_single_process_starts_nothing(monkeypatch):
    for name in ("SLURM_JOB_ID", "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "TPU_WORKER_ID"):
        monkeypatch.delenv(name, raising=False)
    parser = argparse.ArgumentParser()
    processes.add_flags(parser)
    threads = threading.active_count()
    assert processes.start(parser.parse_args([])) == launch.Launch()
    assert processes.start(parser.parse_args(["--num_processes=1"])).processes == 1
    assert processes.is_first()
    assert processes.connection() is None
    assert not jax.distributed.is_initialized()
    assert threading.active_count() == threads
