"""A profiler trace of a few steps of a run."""

from __future__ import annotations

from pathlib import Path

import jax

from training.run.state import TrainState


class Tracer:
    """A profiler trace of three steps, once compilation is over."""

    def __init__(self, folder: Path, first_step: int, total: int):
        self.folder, self.begin = folder, min(first_step + 3, max(total - 3, first_step + 1))
        self.end = min(self.begin + 3, total)

    def after(self, step: int, state: TrainState) -> None:
        """To be called after every step."""
        if step == self.begin:
            jax.block_until_ready(state.step)
            jax.profiler.start_trace(str(self.folder))
        if step == self.end:
            jax.block_until_ready(state.step)
            jax.profiler.stop_trace()
