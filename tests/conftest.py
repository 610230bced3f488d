"""Shared test set-up: CPU only, whatever the machine has, chosen before JAX is imported; signatures are checked."""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import checked  # noqa: E402

checked.install()

import tiny  # noqa: E402

# Most of the time of these tests is compilation of small programs, many of them the same in several tests.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(tiny.CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# Compiling them takes longer than running them, so they are compiled without optimization.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
os.environ.setdefault("FOVEA_CACHE", str(tiny.CACHE / "data"))
