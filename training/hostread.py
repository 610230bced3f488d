"""The only place where the host reads results of a compiled step.

A read waits for the device, so the loop reads at log steps only; `reads` counts, and a test compares the count with
the log steps.
"""

from __future__ import annotations

from typing import Any

import jax

reads = 0


def read(tree: Any) -> Any:
    """Returns the arrays of `tree` as NumPy arrays, after the device has finished them."""
    global reads
    reads += 1
    return jax.device_get(tree)
