"""The GPU kernels compiled to machine code for H100 and A100, where the CUDA plugin is installed; no GPU is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpus

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {"forward", "dq", "dkv", "dbias"}


@pytest.mark.slow
@pytest.mark.parametrize("gpu", sorted(gpus.GPUS))
@pytest.mark.parametrize("case", ["DiNAT D32 bf16, bias, 7 x 7", "2-D D32 f32, bias"])
def test_kernels_compile_without_spills(gpu, case):
    if lacking := gpus.missing():
        pytest.skip(lacking)
    # A process of its own: compilers read their flags once, and those of the tests switch optimization off.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "benchmarks.neighborhood_gpu_compile", f"--gpu={gpu}", f"--case={case}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    header, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines())
    kernels = {row["kernel"]: row for row in (dict(zip(header, line, strict=True)) for line in lines)}
    assert kernels.keys() == KERNELS
    for name, row in kernels.items():
        assert int(row["spills"]) == 0, name
        assert 0 < int(row["registers"]) < 255, name
        # Float32 factors would be rounded by the matrix units; half-precision ones belong there.
        assert (int(row["products"]) > 0) == ("bf16" in case), name
        assert int(row["copies"]) > 0, name


def test_what_is_lacking_is_said(monkeypatch):
    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the CUDA plugin is not installed"):
        gpus.use_compiler()


PTX = """
.version 9.0
.target sm_90a
.visible .entry kernel(
\twgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16
\t@%p1 cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
"""
SAID = """ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
ptxas info    : Function properties for kernel
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 77 registers, used 1 barriers
"""


def test_what_ptxas_says_is_read(monkeypatch, tmp_path):
    (tmp_path / "module.1.ptx").write_text(PTX)
    (tmp_path / "module.thunk_sequence.txt").write_text(
        "001: kCustomKernel [source] kernel grid: [196, 1, 1] threads: [128, 1, 1]  shared_memory: 12288 bytes"
    )
    done = subprocess.CompletedProcess([], 0, stdout="", stderr=SAID)
    monkeypatch.setattr(gpus, "_ptxas", lambda: Path("ptxas"))
    monkeypatch.setattr(gpus.subprocess, "run", lambda *_, **__: done)
    assert gpus.read_kernels(tmp_path / "module.1.ptx") == [
        gpus.Kernel("kernel", registers=77, spills=20, threads=128, shared_memory=12288, products=1, copies=1)
    ]
