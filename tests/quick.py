"""How programs are compiled in tests: to be compiled soon, not to run fast; most of them run once."""

import os
from importlib.metadata import version

FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# Halves the time again. It is known to this version alone, and others, libtpu among them, stop at it.
MORE = "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""


def flags(environment=os.environ):
    """`XLA_FLAGS` and more, for a process that has no other compiler than that of a CPU."""
    known = environment.get("XLA_FLAGS", "")
    return known if MORE in known else f"{known} {MORE}".strip()
