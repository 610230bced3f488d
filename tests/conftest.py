"""Shared test set-up: CPU only, whatever the machine has, chosen before JAX is imported; signatures are checked."""

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import checked  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
import quick  # noqa: E402

checked.install()

import tiny  # noqa: E402

# Most of the time of these tests is compilation of small programs, many of them the same in several tests.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(tiny.CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("XLA_FLAGS", quick.FLAGS)
if quick.MORE:  # read here, once, and gone before libtpu looks
    known = os.environ["XLA_FLAGS"]
    os.environ["XLA_FLAGS"] = quick.flags()
    jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
    os.environ["XLA_FLAGS"] = known
os.environ.setdefault("FOVEA_CACHE", str(tiny.CACHE / "data"))

# A tenth of the time went into looking for garbage among the programs that are kept.
gc.set_threshold(50_000, 20, 50)

# Linux lets a process have 65530 mappings; a compiled program takes six, and the process dies where it gets no more.
MOST_MAPPINGS = 20_000


@pytest.fixture(scope="module", autouse=True)
def programs_are_let_go():
    """After a file that leaves many compiled programs behind, before the worker that ran it is full of them."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
