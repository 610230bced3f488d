"""How programs are compiled in tests: to be compiled soon, not to run fast; most of them run once."""

import os
from importlib.metadata import version

FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# The first halves the time again; the second, of the version that lacks the first, takes off a little. Both are known
# to their versions alone, and others, libtpu among them, stop at what they do not know.
MORE = {"0.10": "--xla_cpu_use_fusion_emitters=false", "0.12": "--xla_cpu_opt_preset=FAST_COMPILE"}.get(
    ".".join(version("jaxlib").split(".")[:2]), ""
)


def flags(environment=os.environ):
    """`XLA_FLAGS` and more, for a process that has no other compiler than that of a CPU."""
    known = environment.get("XLA_FLAGS", "")
    return known if MORE in known else f"{known} {MORE}".strip()
