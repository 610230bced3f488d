"""NVIDIA GPUs that this machine need not have: descriptions to compile for, and what the compiler made of a program.

The CUDA plugin (`pip install "jax[cuda13]"`) brings the whole compiler, ptxas too, which needs no GPU if it is told
about one. A description is XLA's `GpuTargetConfigProto`. Its figures are from NVIDIA's data sheets and from the table
of technical specifications in the CUDA programming guide (compute capability 8.0 and 9.0).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

COMMON = (
    "threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 threads_per_core_limit: 2048 "
    "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 "
    "registers_per_core_limit: 65536 registers_per_block_limit: 65536 "
)
GPUS = {
    "h100": (
        "NVIDIA H100 80GB HBM3",
        "core_count: 132 fpus_per_core: 128 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 "
        "memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072 "
        "cuda_compute_capability { major: 9 minor: 0 }",
    ),
    "a100": (
        "NVIDIA A100-SXM4-80GB",
        "core_count: 108 fpus_per_core: 64 shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912 "
        "memory_bandwidth: 2039000000000 l2_cache_size: 41943040 clock_rate_ghz: 1.41 device_memory_size: 85899345920 "
        "cuda_compute_capability { major: 8 minor: 0 }",
    ),
}
"""Short name -> what the driver calls it, and what sets it apart."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel, and of what it is made.

    Attributes:
      registers: of a thread, at most 255; spills: bytes of a thread stored and loaded for want of them.
      threads, shared_memory: of a block; shared memory in bytes.
      products: instructions for the matrix units; copies: asynchronous ones to shared memory.
    """

    name: str
    registers: int
    spills: int
    threads: int
    shared_memory: int
    products: int
    copies: int


def missing() -> str | None:
    """What is lacking to compile for GPUs; None: nothing."""
    if importlib.util.find_spec("jax_plugins") is None or not _plugin():
        return 'the CUDA plugin is not installed (pip install "jax[cuda13]")'
    if _ptxas() is None:
        return "there is no ptxas beside the CUDA plugin"
    return None


def use_compiler() -> None:
    """Makes JAX compile for GPUs on this machine, whatever it has; call it before anything else is asked of JAX.

    Raises:
      ValueError: the plugin is not installed.
    """
    if lacking := missing():
        raise ValueError(f"compiling for a GPU: {lacking}")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # else the plugin looks for a driver
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # what is for absent devices cannot be read back


def device(name: str) -> Any:
    """A device that can be compiled for and not run on, `h100` or `a100`."""
    from jax.experimental import topologies

    called, own = GPUS[name]
    description = (
        f"gpu_device_info {{ {COMMON} {own} }} platform_name: 'CUDA' dnn_version_info {{ major: 9 minor: 8 }} "
        f"device_description_str: '{called}'"
    )
    return topologies.get_topology_desc("", platform="cuda", target_config=description, topology="1x1x1").devices[0]


def compile_for(name: str, function: Callable, arguments: Sequence[Any]) -> tuple[Kernel, ...]:
    """Compiles a function of arrays (anything with shape and dtype, or None) to machine code of a GPU."""
    sharding = jax.sharding.SingleDeviceSharding(device(name))
    placed = [
        None if one is None else jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=sharding) for one in arguments
    ]
    lowered = jax.jit(function).trace(*placed).lower(lowering_platforms=("cuda",))
    with tempfile.TemporaryDirectory() as directory:
        lowered.compile(compiler_options={"xla_dump_to": directory})
        kernels = [kernel for path in Path(directory).glob("*.ptx") for kernel in read_kernels(path)]
    return tuple(sorted(kernels, key=lambda kernel: kernel.name))


def read_kernels(ptx: Path) -> list[Kernel]:
    """The kernels of a file of PTX, assembled once more for what ptxas says about them."""
    text = ptx.read_text()
    target = re.search(r"^\.target (\w+)", text, re.MULTILINE)
    entries = re.split(r"(?=^\.visible \.entry )", text, flags=re.MULTILINE)[1:]
    if not target or not entries:
        return []
    said = subprocess.run(
        [str(_ptxas()), "-v", f"-arch={target[1]}", str(ptx), "-o", os.devnull],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    launches = "".join(path.read_text() for path in ptx.parent.glob("*thunk_sequence.txt"))
    kernels = []
    for entry in entries:
        name = entry.split("(")[0].split()[-1]
        found = re.search(
            rf"Function properties for {name}\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
            r"Used (\d+) registers",
            said,
            re.DOTALL,
        )
        launch = re.search(rf"\b{name} .*?threads: \[(\d+),.*?shared_memory: (\d+)", launches)
        if found:
            kernels.append(
                Kernel(
                    name,
                    registers=int(found[3]),
                    spills=int(found[1]) + int(found[2]),
                    threads=int(launch[1]) if launch else 0,
                    shared_memory=int(launch[2]) if launch else 0,
                    products=len(re.findall(r"\s(?:wgmma\.mma_async|mma)\.sync", entry)),
                    copies=len(re.findall(r"\scp\.async\.c[ag]", entry)),
                )
            )
    return kernels


def _plugin() -> bool:
    return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13))


def _ptxas() -> Path | None:
    nvidia = importlib.util.find_spec("nvidia")
    places = [] if nvidia is None else list(nvidia.submodule_search_locations or [])
    found = [path for place in places for path in sorted(Path(place).glob("*/bin/ptxas"))]
    return found[0] if found else None
