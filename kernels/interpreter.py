"""Kernels on machines that have no device for them, by Pallas' interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

# A user context is part of the key of every cache of traces: no kernel traced for a device is used by the interpreter.
# It has to be there before anything is traced, since a context that comes later changes all keys; so this module is
# imported with the package, and not with the kernels, which wait for their first use.
interpreted = jax.make_user_context(False)


@contextlib.contextmanager
def interpret() -> Iterator[None]:
    """Kernels traced inside run on any machine: slow, for tests."""
    with interpreted(True):
        yield
