"""Compiling for TPUs inside a test."""

import contextlib
import importlib.util
import os

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from training.plans import chips

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install libtpu"
)


@contextlib.contextmanager
def for_tpus():
    """libtpu reads its environment when it is loaded, which nothing but a plan does; JAX has read its own before."""
    before = dict(os.environ)
    if importlib.util.find_spec("libtpu"):
        chips.use_compiler()
    compilation_cache.reset_cache()
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    os.environ.clear()
    os.environ.update(before)
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
