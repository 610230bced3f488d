"""Finding checkpoints and reading them; nothing here changes a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from jaxtyping import PyTree

import naming
from training.checkpoints import checkpoint_files as files
from training.checkpoints import checkpoint_layout as layout
from training.checkpoints.checkpoint_files import InaccessibleCheckpoint, UnreadableCheckpoint

FINE, DAMAGED, OUT_OF_REACH = range(3)


def find(path: str | os.PathLike[str], step: int | None = None) -> Path:
    """The directory of one checkpoint.

    Args:
      path: a workdir, its `checkpoints` folder, or one checkpoint.
      step: which; None is the newest.

    Raises:
      FileNotFoundError: there is none; the line says which there are.
    """
    return candidates(path, step)[0]


def restore_for_eval(path: str | os.PathLike[str], step: int | None = None) -> dict[str, Any]:
    """Reads what evaluation, fine-tuning and teachers need, without a model as template.

    Args:
      path: a workdir, its `checkpoints` folder, or one checkpoint.
      step: which; None is the newest that can be read. Newer ones that cannot be are named on stderr.

    Returns:
      `params` and `model_state`, flat dictionaries of NumPy arrays with unrolled names; `ema`, a dictionary of both, or
      None if the run kept no averages; `config` as it was saved; `step`; `metadata` as `Checkpointer.restore` returns
      it; and `path`.

    Raises:
      FileNotFoundError: there is no such checkpoint; the line says which there are.
      UnreadableCheckpoint: it, or every one there is, is damaged.
      InaccessibleCheckpoint: it may be intact and cannot be read here and now.
    """

    def read(found: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        about = files.read_about(found)
        return about, files.read_arrays(found, about, ("params", "model_state", "ema"))

    found, (about, arrays) = first_readable(candidates(path, step), read)

    def part(prefix: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}

    averaged = any(name.startswith("ema/") for name in arrays)
    metadata = metadata_of(about)
    return {
        "params": part("params/"),
        "model_state": part("model_state/"),
        "ema": {"params": part("ema/params/"), "model_state": part("ema/model_state/")} if averaged else None,
        "config": metadata.get("config", {}),
        "step": about["step"],
        "metadata": metadata,
        "path": found,
    }


def steps_in(directory: Path) -> list[int]:
    """Steps of the checkpoints in a folder, ascending, complete or damaged."""
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


def candidates(path: str | os.PathLike[str], step: int | None) -> list[Path]:
    """Directories of the checkpoints that a user may mean, newest first; never empty."""
    path = Path(path).absolute()
    if not path.is_dir():
        raise FileNotFoundError(f"no workdir or checkpoint {path}{naming.beside(path)}")
    if path.name.isdecimal() and (path / "about").is_dir():
        if step not in (None, int(path.name)):
            raise FileNotFoundError(f"{path} is the checkpoint of step {path.name}, not of step {step}")
        return [path]
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = steps_in(directory)
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {directory}")
    if step is None:
        return [directory / str(s) for s in reversed(steps)]
    if step not in steps:
        raise FileNotFoundError(f"no checkpoint of step {step} in {directory}; available: {', '.join(map(str, steps))}")
    return [directory / str(step)]


def read_state(
    candidates: Sequence[Path],
    template: PyTree,
    shardings: PyTree[Sharding] | None = None,
    parts: Sequence[str] | None = None,
) -> tuple[Path, PyTree, dict[str, Any]]:
    """The state in the first of some checkpoints that can be read, its place and metadata.

    Of several processes all call this.

    Args:
      candidates: newest first.
      template, shardings: as for `training.checkpoints.checkpoint.Checkpointer.restore`, and so are the errors.
      parts: the first components of names that the template has, where it lacks some of the file; None is all.
    """
    wanted, keys = layout.expected(template), layout.key_implementations(template)
    several = jax.process_count() > 1 and shardings is not None
    places = layout.layer_shardings(template, shardings) if several else {}

    def read(path: Path) -> tuple[dict[str, Any], Mapping[str, Any]]:
        about = files.read_about(path)
        if parts is not None:
            for part in ("arrays", "keys"):
                about[part] = {name: value for name, value in about[part].items() if name.split("/")[0] in parts}
        if different := layout.difference(about["arrays"], wanted):
            raise ValueError(f"checkpoint {path} does not fit this model: {different}")
        if about["keys"] != keys:
            raise ValueError(f"checkpoint {path} has random keys {about['keys']}, and this run {keys}")
        return about, files.read_shards(path, about, places) if several else files.read_arrays(path, about, parts)

    def put(found: tuple[dict[str, Any], Mapping[str, Any]]) -> tuple[dict[str, Any], PyTree]:
        about, arrays = found
        state = (layout.fill_shards if several else layout.fill)(template, arrays, shardings)
        if several:
            files.verify(about, layout.checksums(state))
        return about, state

    path, (about, state) = first_readable(candidates, read, put)
    return path, state, metadata_of(about)


def first_readable(
    candidates: Sequence[Path], read: Callable[[Path], Any], then: Callable[[Any], Any] = lambda found: found
) -> tuple[Path, Any]:
    """The first checkpoint that every process can read, and what comes of it; those before it are named on stderr.

    Args:
      candidates: newest first.
      read: reads one, in each process by itself.
      then: goes on with what was read, in all processes together; what it finds damaged, it finds so in all.

    Raises:
      UnreadableCheckpoint: all of them are damaged.
      InaccessibleCheckpoint: one may be intact and cannot be read here and now. An older one is no substitute: steps
        would be taken again, and written over those that are there.
    """
    for i, path in enumerate(candidates):
        try:
            return path, then(_together(read, path))
        except InaccessibleCheckpoint as error:
            raise InaccessibleCheckpoint(
                f"checkpoint {path} cannot be accessed ({error}); it may be intact, so no older one is used: make it "
                "readable, or move it away"
            ) from error
        except UnreadableCheckpoint as error:
            if i + 1 == len(candidates):
                others = f", nor the {i} newer" if i else ""
                raise UnreadableCheckpoint(f"checkpoint {path} cannot be read ({error}){others}") from error
            print(
                f"checkpoint {path} cannot be read ({error}); using {candidates[i + 1].name} instead",
                file=sys.stderr,
                flush=True,
            )
    raise AssertionError("no candidates")


def _together(read: Callable[[Path], Any], path: Path) -> Any:
    """Reads in all processes, of which each may have storage of its own that fails: all succeed, or all fail alike."""
    found, state = None, FINE
    failure: OSError | None = None
    try:
        found = read(path)
    except InaccessibleCheckpoint as error:
        failure, state = error, OUT_OF_REACH
    except UnreadableCheckpoint as error:
        failure, state = error, DAMAGED
    if jax.process_count() > 1:
        states = multihost_utils.process_allgather(np.int32(state))
        worst = int(states.max())
        if worst != state:
            kind = InaccessibleCheckpoint if worst == OUT_OF_REACH else UnreadableCheckpoint
            failure = kind(f"process {int(states.argmax())} cannot read it")
    if failure is not None:
        raise failure
    return found


def metadata_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """What `save` was given with a checkpoint, and what it added."""
    return {**about["metadata"], **{name: about[name] for name in ("step", "saved_at", "versions", "metric")}}


def describe(candidates: Sequence[Path]) -> dict[str, Any]:
    """The metadata of the first of some checkpoints whose description can be read; errors as `first_readable`."""
    return metadata_of(first_readable(candidates, files.read_about)[1])
