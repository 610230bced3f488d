"""The only place where the host reads results of a compiled step.

A read waits for the device, so the loop reads at log steps only; `reads` counts, and a test compares the count with
the log steps.
"""

from __future__ import annotations

from typing import Any

import jax

from training.distributed import mesh

reads = 0


def read(tree: Any) -> Any:
    """Returns the arrays of `tree` as NumPy arrays, after the device has finished them; all processes read together."""
    global reads
    reads += 1
    return mesh.gather(tree) if jax.process_count() > 1 else jax.device_get(tree)
