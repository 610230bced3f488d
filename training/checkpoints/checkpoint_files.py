"""One checkpoint on disk: written by Orbax under a temporary name and renamed when complete, read back and verified.

<step>/arrays   Orbax's PyTree of arrays, nested at the `/` of their names
<step>/about    JSON: metadata, and for each array its shape, type and checksum
<step>/metric.json   how good it is, which is found out when the rest is safe
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from jax.sharding import Sharding

from training.checkpoints import checkpoint_layout as layout
from training.checkpoints import json_text
from training.checkpoints.checkpoint_layout import ArrayInfo
from training.checkpoints.whole import write_whole

FORMAT = 1
METRIC = "metric.json"
# Orbax writes `<step>.orbax-checkpoint-tmp`, `remove` renames to `<step>.deleted`: neither is taken for a checkpoint.
LEFTOVER = re.compile(r"\d+\.(orbax-checkpoint-tmp.*|deleted)")


class UnreadableCheckpoint(OSError):
    """A checkpoint that is damaged, incomplete or not a checkpoint; the message is the reason."""


def write(path: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Writes a checkpoint and returns when it is complete; the name `path` exists only from then on.

    Args:
      path: directory to create; must not exist.
      arrays: host arrays by `/`-joined names.
      about: JSON-compatible description; the table of arrays is added.

    Raises:
      OSError: the storage refused, with `errno` set. Only temporary names are left behind.
    """
    size = sum(array.nbytes for array in arrays.values())
    if shutil.disk_usage(path.parent).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    table = {name: ArrayInfo(array.shape, array.dtype.name, layout.crc32(array)) for name, array in arrays.items()}
    with _storage_errors(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=_save_args(arrays, about, table))


def start_write(
    checkpointer: ocp.AsyncCheckpointer, path: Path, arrays: Mapping[str, jax.Array], about: Mapping[str, Any]
) -> None:
    """Starts a write in which every process takes part with the shards it holds; `checkpointer` waits for its end.

    No process has whole arrays, so that there are no checksums.
    """
    table = {name: ArrayInfo(array.shape, array.dtype.name) for name, array in arrays.items()}
    with _storage_errors():
        checkpointer.save(path, args=_save_args(arrays, about, table))


def finish_write(checkpointer: ocp.AsyncCheckpointer) -> None:
    """Waits for `start_write`; raises what `write` raises."""
    with _storage_errors():
        checkpointer.wait_until_finished()


def read_about(path: Path) -> dict[str, Any]:
    """The description of a checkpoint, with `arrays` as a table `{name: ArrayInfo}`.

    Raises:
      UnreadableCheckpoint: damaged or not a checkpoint.
    """
    _quiet()
    with _damage(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        envelope = checkpointer.restore(path, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
        content = envelope["content"]
        if _json_crc32(content) != envelope["crc32"]:
            raise UnreadableCheckpoint("its description does not match its checksum")
        if content["format"] != FORMAT:
            raise UnreadableCheckpoint(f"it has format {content['format']}, and this version reads format {FORMAT}")
        table = content["arrays"].items()
        content["arrays"] = {name: ArrayInfo(tuple(shape), dtype, crc32) for name, (shape, dtype, crc32) in table}
        content["metric"] = content.get("metric") or _read_metric(path)  # it was part of the description once
        return content


def write_metric(path: Path, metric: Mapping[str, Any]) -> None:
    """Adds to a complete checkpoint how good it is, in one piece."""
    with _storage_errors():
        write_whole(path / METRIC, json_text.text(metric))


def _read_metric(path: Path) -> dict[str, Any] | None:
    """None as well where it was damaged: the checkpoint is whole without it."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads((path / METRIC).read_text())
        return {"name": str(found["name"]), "value": float(found["value"])}
    return None


def read_arrays(path: Path, about: Mapping[str, Any], parts: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Reads arrays to the host and verifies their checksums.

    Args:
      path: the checkpoint.
      about: its description, from `read_about`.
      parts: first components of the names to read; None reads all.

    Raises:
      UnreadableCheckpoint: damaged.
    """
    _quiet()
    table = {name: info for name, info in about["arrays"].items() if parts is None or name.split("/")[0] in parts}
    item = _nest({name: 0 for name, info in table.items() if 0 not in info.shape})
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    with _damage(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        args = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
        found = _flatten(checkpointer.restore(path, args=ocp.args.Composite(arrays=args)).arrays) if item else {}
        arrays = {}
        for name, info in table.items():
            array = np.zeros(info.shape, layout.dtype_of(info.dtype)) if 0 in info.shape else np.asarray(found[name])
            same = (array.shape, array.dtype.name) == (info.shape, info.dtype)
            if not same or info.crc32 not in (None, layout.crc32(array)):
                raise UnreadableCheckpoint(f"{name} does not match its checksum")
            arrays[name] = array
    return arrays


def read_shards(path: Path, about: Mapping[str, Any], shardings: Mapping[str, Sharding]) -> dict[str, jax.Array]:
    """Reads global arrays, of which each process reads the shards of its devices; all processes call it.

    Nobody has whole arrays, so that checksums are not verified; a truncated or missing file is found.

    Args:
      shardings: by name, for every array of the checkpoint.

    Raises:
      UnreadableCheckpoint: damaged.
    """
    _quiet()
    table = {name: info for name, info in about["arrays"].items() if 0 not in info.shape}
    places = {
        name: ocp.ArrayRestoreArgs(sharding=shardings[name], dtype=layout.dtype_of(info.dtype))
        for name, info in table.items()
    }
    with _damage(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        args = ocp.args.PyTreeRestore(item=_nest(dict.fromkeys(table, 0)), restore_args=_nest(places))
        arrays = _flatten(checkpointer.restore(path, args=ocp.args.Composite(arrays=args)).arrays)
        for name in about["arrays"].keys() - table.keys():  # Orbax keeps no arrays without elements
            info = about["arrays"][name]
            empty = np.zeros(info.shape, layout.dtype_of(info.dtype))
            arrays[name] = jax.make_array_from_callback(info.shape, shardings[name], empty.__getitem__)
        return arrays


def remove(path: Path) -> None:
    """Deletes a checkpoint; killed half-way, it leaves nothing that could be taken for one."""
    doomed = path.with_name(f"{path.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Deletes what interrupted writes and deletions left."""
    for path in directory.iterdir():
        if LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _save_args(
    arrays: Mapping[str, Any], about: Mapping[str, Any], table: Mapping[str, ArrayInfo]
) -> ocp.args.Composite:
    _quiet()
    content = {**about, "format": FORMAT, "arrays": {name: list(info) for name, info in table.items()}}
    # Orbax refuses arrays without elements; their shape and type are all there is to keep.
    tree = _nest({name: array for name, array in arrays.items() if 0 not in array.shape})
    envelope = {"crc32": _json_crc32(content), "content": content}
    return ocp.args.Composite(arrays=ocp.args.PyTreeSave(tree), about=ocp.args.JsonSave(envelope))


def _json_crc32(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value})
    return flat


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """Turns whatever a damaged file makes Orbax raise (of many types) into one type and one line."""
    try:
        yield
    except (UnreadableCheckpoint, MemoryError):
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UnreadableCheckpoint(f"{type(error).__name__}: {reason[:200]}") from error


@contextlib.contextmanager
def _storage_errors() -> Iterator[None]:
    """Turns a refusal of the storage, which TensorStore reports as ValueError, into an OSError with its `errno`."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        code = re.search(r"os_error_code=\\?'(\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


class _OrbaxNoise(logging.Filter):
    """Drops Orbax's progress messages, and its log of exceptions that it raises anyway."""

    def filter(self, record: logging.LogRecord) -> bool:
        if "orbax" not in record.pathname:
            return True
        return record.levelno >= logging.WARNING and not record.pathname.endswith("futures/future.py")


@functools.cache
def _quiet() -> None:
    """Keeps the terminal for what a user can act on.

    When one of many concurrent reads or writes fails, those still under way find Orbax's event loop closed, and each
    prints a traceback of that through `sys.unraisablehook`, which says nothing that the one error does not.
    """
    absl_logging.get_absl_logger().addFilter(_OrbaxNoise())
    hook = sys.unraisablehook

    def drop(event: Any) -> None:
        if not (isinstance(event.exc_value, RuntimeError) and str(event.exc_value) == "Event loop is closed"):
            hook(event)

    sys.unraisablehook = drop
