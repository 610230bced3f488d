"""The manifests of deploy/ say to the processes what they read, and to the scheduler what they leave with."""

import math
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import configs
import errors
from training.distributed.launch import decide

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"


def documents(name):
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def check_command(container):
    """A command that train.py accepts, and that receives signals itself."""
    python, script, *arguments = container["command"]
    assert (python, script) == ("python", "train.py")
    path, overrides, rest = configs.split_arguments(arguments)
    config = configs.load(str(ROOT / path), overrides)
    assert any(argument.startswith("--workdir=") for argument in rest)
    return config


def exit_codes(job):
    return {
        value: rule["action"]
        for rule in job["podFailurePolicy"]["rules"]
        for value in rule.get("onExitCodes", {}).get("values", [])
    }


def test_kubernetes_gpu():
    service, job = documents("kubernetes_gpu.yaml")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    for index in range(spec["completions"]):
        launch = decide({**variables, "JOB_COMPLETION_INDEX": str(index)}, {})
        assert (launch.processes, launch.process) == (spec["completions"], index)
        assert launch.address.split(":")[0] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    config = check_command(container)
    assert config.data.batch_size % (spec["completions"] * container["resources"]["limits"]["nvidia.com/gpu"]) == 0
    assert exit_codes(spec) == {
        errors.INPUT: "FailJob",
        errors.AGAIN: "Ignore",
        errors.INTERNAL: "Count",
        errors.MACHINE: "Count",
    }
    assert spec["backoffLimit"] > 10
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}


def test_gke_tpu():
    (jobset,) = documents("gke_tpu.yaml")
    (group,) = jobset["spec"]["replicatedJobs"]
    spec = group["template"]["spec"]
    pod = spec["template"]["spec"]
    assert spec["completions"] == spec["parallelism"]
    (container,) = pod["containers"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert spec["completions"] * container["resources"]["limits"]["google.com/tpu"] == chips
    config = check_command(container)
    assert chips % config.mesh.fsdp == 0
    assert config.data.batch_size % chips == 0
    assert exit_codes(spec) == {errors.INPUT: "FailJob"}
    assert jobset["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert all("name" in rule for rule in jobset["spec"]["failurePolicy"]["rules"])  # asked for by JobSet's schema
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}


@pytest.mark.parametrize("name", ["gke_tpu.yaml", "kubernetes_gpu.yaml"])
def test_the_image_has_its_dockerfile(name):
    """The manifest names what a command in the Dockerfile tags, which installs an extra that exists."""
    text = (DEPLOY / "Dockerfile").read_text()
    images = re.findall(r"^ +image: (\S+)", (DEPLOY / name).read_text(), re.MULTILINE)
    builds = dict(reversed(found) for found in re.findall(r"--build-arg=EXTRA=(\w+) --tag=(\S+)", text))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {builds.get(image) for image in images} <= extras.keys()
    for file in re.search(r"^COPY ((?:\S+\.\S+ )+)\./$", text, re.MULTILINE)[1].split():
        assert (ROOT / file).is_file()


def test_slurm():
    text = (DEPLOY / "slurm.sh").read_text()
    settings = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    assert settings["ntasks-per-node"] == "1"
    assert settings["signal"].startswith("TERM@")  # to the processes; B: would be to the script alone
    assert f'"$code" -eq {errors.AGAIN} ' in text
    for process in range(int(settings["nodes"])):
        given = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": settings["nodes"]}
        assert decide({**given, "SLURM_PROCID": str(process)}, {}).process == process


def test_the_scripts_are_scripts():
    for script in DEPLOY.glob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert script.stat().st_mode & 0o100


def slurm(tmp_path, code, restarts=0):
    """What `scontrol` was asked for after the processes left with `code`, and what the script leaves with."""
    for name, text in (("srun", f"exit {code}"), ("scontrol", f'echo "$@" > {tmp_path}/asked')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": str(restarts)}
    done = subprocess.run(["bash", str(DEPLOY / "slurm.sh")], env=environment, check=False)
    asked = tmp_path / "asked"
    return (asked.read_text().strip() if asked.exists() else ""), done.returncode


@pytest.mark.parametrize(
    ("code", "restarts", "requeues"),
    [
        (0, 0, False),
        (errors.INTERNAL, 0, False),
        (errors.INPUT, 0, False),
        (errors.AGAIN, 100, True),
        (137, 100, True),
        (errors.MACHINE, 0, True),
        (errors.MACHINE, 10, False),
    ],
)
def test_slurm_queues_again_what_can_continue(code, restarts, requeues, tmp_path):
    assert slurm(tmp_path, code, restarts) == ("requeue 17" if requeues else "", code)
