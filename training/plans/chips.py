"""TPU chips and the topologies made of them, for plans on machines that have none.

Figures of a chip are from Google's Cloud TPU documentation (system architecture pages of v5e, v5p, v6e and TPU7x, read
in 2025): peak bf16 FLOP/s, HBM bandwidth, bidirectional ICI bandwidth (half of it is one way; divided by the ports of a
2-D torus, 4, or a 3-D one, 6), data-center network bandwidth. `usable_hbm` is what the TPU compiler (libtpu 0.0.52)
says it may use when a program does not fit. `flops_per_cycle` is the width of the matrix units; the clock follows from
it and the peak.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip. Per device, which JAX sees: a chip, or one of the two halves of a TPU7x.

    Attributes:
      flops: peak of bf16 matrix products, FLOP/s.
      flops_per_cycle: of the matrix units.
      usable_hbm: bytes; hbm_bandwidth: bytes/s.
      port_bandwidth: of one port to a neighbouring chip, bytes/s one way; shared by the devices of a chip.
      network_bandwidth: to other slices, bytes/s.
      devices: of a chip.
      axes: of the torus.
      closes_at: an axis is closed to a ring if its length is a multiple of this.
      most_chips: of one slice.
    """

    flops: float
    flops_per_cycle: int
    usable_hbm: float
    hbm_bandwidth: float
    port_bandwidth: float
    network_bandwidth: float
    devices: int
    axes: int
    closes_at: int
    most_chips: int

    @property
    def clock(self) -> float:
        """Cycles per second."""
        return self.flops / self.flops_per_cycle


CHIPS: Mapping[str, Chip] = {
    "v5e": Chip(197e12, 4 * 2 * 128**2, 15.75 * GIB, 819e9, 50e9, 25e9 / 8, 1, 2, 16, 256),
    "v5p": Chip(459e12, 8 * 2 * 128**2, 95.73 * GIB, 2765e9, 100e9, 50e9 / 8, 1, 3, 4, 6144),
    "v6e": Chip(918e12, 4 * 2 * 256**2, 31.24 * GIB, 1638e9, 100e9, 100e9 / 8, 1, 2, 16, 256),
    "tpu7x": Chip(2307e12 / 2, 4 * 2 * 256**2, 94.74 * GIB, 7380e9 / 2, 100e9, 100e9 / 8 / 2, 2, 3, 4, 9216),
}
"""Name in a topology -> chip. The matrix units of v6e and TPU7x (256 x 256) do two passes a cycle."""

PEAKS: Sequence[tuple[str, float]] = (
    ("TPU v4", 275e12),
    ("TPU v5 lite|TPU v5e", CHIPS["v5e"].flops),
    ("TPU v5", CHIPS["v5p"].flops),
    ("TPU v6", CHIPS["v6e"].flops),
    ("TPU ?7x", CHIPS["tpu7x"].flops),
    (".*GH200|.*H200|.*H100.*HBM3", 989.4e12),
    (".*H100.*PCIe", 756e12),
    (".*A100", 312e12),
    (".*L40S", 362e12),
    (".*L4", 121e12),
)
"""Beginning of `jax.Device.device_kind` -> its peak of bf16 matrix products, without sparsity, by the vendors' data
sheets. The first that fits counts."""


def peak(kind: str) -> float | None:
    """FLOP/s of a device by its kind; None for one that is not in the table, and for a CPU."""
    return next((flops for pattern, flops in PEAKS if re.match(pattern, kind)), None)


_FORMS = (
    "write KIND:AxB (v5e, v6e) or KIND:AxBxC (v5p, tpu7x), such as v5e:16x16, v5p:8x16x16, tpu7x:4x4x4, or "
    "2*v5e:16x16 for two slices"
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` equal slices, each a grid of chips."""

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        """What it is made of."""
        return CHIPS[self.kind]

    def __str__(self) -> str:
        grid = f"{self.kind}:{'x'.join(map(str, self.shape))}"
        return f"{self.slices}*{grid}" if self.slices > 1 else grid

    def devices(self) -> Sequence[Any]:
        """Devices that can be compiled for and not run on.

        Raises:
          ValueError: the TPU compiler knows no such grid.
        """
        import jax
        from jax.experimental import topologies

        name = f"{self.kind}:{'x'.join(map(str, self.shape))}"
        options = {"num_slices": self.slices} if self.slices > 1 else {}
        try:
            with _quiet():
                return topologies.get_topology_desc(name, platform="tpu", **options).devices
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(f"--plan={self}: {str(error).splitlines()[0]}; {_FORMS}") from error

    def ports(self, devices: Sequence[Any]) -> int:
        """How many ports of a chip an exchange among some devices of one slice can use at once: one a direction of
        every axis along which they differ; an open axis lets data pass one way only.
        """
        used = 0
        for axis, length in enumerate(self.shape):
            places = {device.coords[axis] for device in devices}
            if len(places) > 1:
                used += 2 if len(places) == length and length % self.chip.closes_at == 0 else 1
        return used


def parse(text: str) -> Topology:
    """Reads `v5e:16x16` or `2*v5e:16x16`.

    Raises:
      ValueError: it is none; the message lists the forms.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", text)
    if not found:
        raise ValueError(f"--plan={text}: no topology; {_FORMS}")
    slices, kind, shape = int(found[1] or 1), found[2], tuple(map(int, found[3].split("x")))
    if kind not in CHIPS:
        raise ValueError(f"--plan={text}: there is no chip {kind!r}, there are {', '.join(CHIPS)}; {_FORMS}")
    chip = CHIPS[kind]
    if len(shape) != chip.axes or slices < 1 or min(shape) < 1:
        raise ValueError(f"--plan={text}: {kind} has {chip.axes} axes; {_FORMS}")
    if math.prod(shape) > chip.most_chips:
        raise ValueError(
            f"--plan={text}: a slice of {kind} has at most {chip.most_chips} chips; several are written 2*{kind}:..."
        )
    return Topology(kind, shape, slices)


def use_compiler() -> None:
    """Makes JAX compile for TPUs on this machine, whatever it has; call it before JAX is imported.

    Raises:
      ValueError: the TPU compiler is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("--plan needs the TPU compiler: pip install libtpu")
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",  # else libtpu waits for a metadata server
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # else two plans cannot run side by side
        JAX_ENABLE_COMPILATION_CACHE="false",  # what was compiled for absent devices cannot be read back
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what libtpu says on stderr, from C++, about the TPU that this machine does not have."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
