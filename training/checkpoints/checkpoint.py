"""Checkpoints of a run: saved in the background, kept by age and by metric, restored from the newest readable one."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from jaxtyping import PyTree

from training.checkpoints import checkpoint_files as files
from training.checkpoints import checkpoint_layout as layout
from training.checkpoints import checksum, json_text, reading
from training.checkpoints.best import ranked
from training.checkpoints.checkpoint_files import InaccessibleCheckpoint, UnreadableCheckpoint
from training.checkpoints.checkpoint_layout import params_sha256
from training.checkpoints.reading import find, restore_for_eval
from training.distributed import facts

__all__ = [
    "Checkpointer",
    "InaccessibleCheckpoint",
    "UnreadableCheckpoint",
    "find",
    "params_sha256",
    "restore_for_eval",
]


class Checkpointer:
    """Saves and restores the state of one run in `directory/<step>/`.

    A save copies the state to the host and leaves the rest to a background thread, one save at a time. A checkpoint
    appears under its name only when it is complete. In a run of several processes every method is called by all of
    them, and each process writes the shards it holds.

    Args:
      directory: created if missing; leftovers of interrupted saves in it are removed.
      keep_last: how many of the newest checkpoints are kept, at least 1.
      keep_best: how many of the best by metric are kept besides.
      best_metric: name of the metric given to `save`, recorded with it.
      best_mode: whether the best is the highest ("max") or the lowest ("min").

    Raises:
      ValueError: keep_last, keep_best or best_mode is not allowed.
      OSError: the directory cannot be created or read.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        best_metric: str = "",
        best_mode: Literal["max", "min"] = "max",
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"checkpoint.keep_last={keep_last}: must be at least 1")
        if keep_best < 0:
            raise ValueError(f"checkpoint.keep_best={keep_best}: must be at least 0")
        if best_mode not in ("max", "min"):
            raise ValueError(f"best_mode={best_mode!r}: must be 'max' or 'min'")
        self.directory = Path(directory).absolute()
        self.keep_last, self.keep_best, self.best_metric, self.best_mode = keep_last, keep_best, best_metric, best_mode
        self._multiprocess = jax.process_count() > 1
        self._broken: set[int] = set()
        self._unknown: set[int] = set()  # they may be the best: nobody knows, so that they stay
        self._scores: dict[int, float] = {}
        self._saving: int | None = None  # the step of the save that `wait` has not yet looked at
        self._future: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler()) if self._multiprocess else None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                files.remove_leftovers(self.directory)
        except OSError as error:
            raise _one_line(f"checkpoint directory {self.directory}", error) from error
        for step in self.steps():
            try:
                metric = files.read_about(self.directory / str(step))["metric"]
            except UnreadableCheckpoint:  # `restore` reports it
                continue
            except InaccessibleCheckpoint:
                self._unknown.add(step)
                continue
            if metric is not None and metric["name"] == best_metric:
                self._scores[step] = metric["value"]

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending, without those that were found unreadable."""
        return [step for step in reading.steps_in(self.directory) if step not in self._broken]

    def latest(self) -> int | None:
        """The newest step, or None."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: PyTree, metadata: Mapping[str, Any]) -> None:
        """Starts saving, and returns as soon as the state may be donated. A step that is already there is left alone.

        Args:
          step: number of the checkpoint.
          state: pytree of arrays (see `checkpoint_layout` for the names); of several processes, of global arrays.
          metadata: JSON-compatible: config, data position and whatever `restore` should give back.

        Raises:
          OSError: this or, more often, the save before failed; in one line, which save, where and why.
          TypeError: the metadata cannot be written as JSON.
        """
        self.wait()
        about = {
            "step": step,
            "metadata": json.loads(json_text.text(metadata)),
            "saved_at": time.time(),
            "versions": facts.versions(),
            "keys": layout.key_implementations(state),
        }
        if step in self.steps():
            return
        self._saving = step
        path = self.directory / str(step)
        if self._orbax is None:
            self._future = self._thread.submit(self._write, path, layout.to_host(state), about)
            return
        self._clear(path)
        try:
            files.write(self._orbax, path, jax.jit(layout.unroll)(state), layout.checksums(state), about)
        except OSError as error:
            raise self._failed(step, error) from error

    def attach(self, step: int, metric: float) -> None:
        """Notes the value of `best_metric` of a checkpoint. One that is still being saved gets it when it is complete;
        several processes wait for that. A step that was not saved is left alone.

        Raises:
          OSError: the note could not be written; the checkpoint is there without it.
        """
        if self._saving == step and self._future is not None:
            self._future = self._thread.submit(self._note, step, float(metric), self._future)
        elif self._saving == step:
            self.wait()
            self._note(step, float(metric))
        elif step in self.steps():
            self._note(step, float(metric))
        else:
            return
        self._scores[step] = float(metric)

    def wait(self) -> None:
        """Waits until the save under way, if any, is complete.

        Raises:
          OSError: it failed; in one line, which save, where and why. Earlier checkpoints are as they were.
        """
        step, self._saving = self._saving, None
        if step is None:
            return
        try:
            if self._future is not None:
                self._future.result()
            elif self._orbax is not None:
                files.finish(self._orbax)
                self._tidy()
        except OSError as error:
            raise self._failed(step, error) from error
        finally:
            self._future = None

    def close(self) -> None:
        """Waits for the save under way and ends the background thread; raises what `wait` raises."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self._orbax is not None:
                self._orbax.close()

    def restore(
        self, template: PyTree, step: int | None = None, shardings: PyTree[Sharding] | None = None
    ) -> tuple[PyTree, dict[str, Any]]:
        """Restores a state bit for bit.

        Args:
          template: a state, or its `jax.ShapeDtypeStruct`s, with scanned or unrolled names; shapes and types must agree
            with the file.
          step: which; None is the newest that can be read. Newer ones that cannot be are named on stderr.
          shardings: where the arrays go, in the structure of the template or a prefix of it, for any mesh and number of
            devices; None leaves them where the template has them.

        Returns:
          the state, and the metadata given to `save` with `step`, `saved_at`, `versions` and `metric` added.

        Raises:
          FileNotFoundError: there is no such checkpoint.
          UnreadableCheckpoint: it, or every one there is, is damaged.
          InaccessibleCheckpoint: it may be intact and cannot be read here and now; nothing is changed.
          ValueError: it belongs to another model or optimizer; names what differs.
        """
        self.wait()
        candidates = [path for path in reading.candidates(self.directory, step) if int(path.name) not in self._broken]
        if not candidates:
            raise UnreadableCheckpoint(f"no checkpoint in {self.directory} can be read")
        path, state, metadata = reading.read_state(candidates, template, shardings)
        if self._multiprocess:
            multihost_utils.assert_equal(np.int32(metadata["step"]), "processes restored different checkpoints")
        self._broken.update(int(newer.name) for newer in candidates[: candidates.index(path)])
        return state, metadata

    def _write(self, path: Path, host_state: PyTree, about: Mapping[str, Any]) -> None:
        """The part of a save that runs in the background."""
        self._clear(path)
        arrays = layout.unroll(host_state)
        checksums = {name: checksum.of_host(array) for name, array in arrays.items()}
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            files.write(checkpointer, path, arrays, checksums, about)
        self._tidy()

    def _note(self, step: int, metric: float, saved: Future[None] | None = None) -> None:
        if saved is not None:
            saved.result()  # raises what the save raised
        path = self.directory / str(step)
        if jax.process_index() == 0 and math.isfinite(metric):
            try:
                files.write_metric(path, {"name": self.best_metric, "value": metric})
            except OSError as error:
                raise _one_line(f"the metric of checkpoint {step} in {self.directory}", error) from error

    def _clear(self, path: Path) -> None:
        """Makes way for a new checkpoint where an unreadable one lies."""
        step = int(path.name)
        if step not in self._broken:
            return
        if jax.process_index() == 0:
            files.remove(path)
        if self._multiprocess:
            multihost_utils.sync_global_devices(f"unreadable checkpoint {step} removed")
        self._broken.discard(step)

    def _tidy(self) -> None:
        """Deletes checkpoints that are neither among the newest nor among the best."""
        steps = self.steps()
        scores = {step: self._scores[step] for step in steps if step in self._scores}
        best = ranked(scores, self.best_mode)[: self.keep_best]
        for step in steps[: -self.keep_last]:
            if step not in best and step not in self._unknown and jax.process_index() == 0:
                files.remove(self.directory / str(step))
        if self._multiprocess:
            multihost_utils.sync_global_devices("old checkpoints removed")

    def _failed(self, step: int, error: OSError) -> OSError:
        if jax.process_index() == 0:
            files.remove_leftovers(self.directory)
        newest = self.latest()
        kept = "there is no earlier one" if newest is None else f"the newest complete one is {newest}"
        return _one_line(f"checkpoint {step} could not be saved in {self.directory}", error, f"; {kept}")


def _one_line(what: str, error: OSError, after: str = "") -> OSError:
    """The error with a message of one line and the same `errno`."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    line = OSError(f"{what}: {reason}{after}")
    line.errno = error.errno
    return line
