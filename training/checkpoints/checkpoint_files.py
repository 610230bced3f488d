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

from errors import MachineFault
from training.checkpoints import checkpoint_layout as layout
from training.checkpoints import json_text
from training.checkpoints.checkpoint_layout import ArrayInfo
from training.checkpoints.whole import write_whole

FORMAT = 2  # 1 had CRC-32s, and none of what several processes wrote
METRIC = "metric.json"
# Orbax writes `<step>.orbax-checkpoint-tmp`, `remove` renames to `<step>.deleted`: neither is taken for a checkpoint.
LEFTOVER = re.compile(r"\d+\.(orbax-checkpoint-tmp.*|deleted)")


# What a damaged checkpoint looks like to the system: files that are missing, or of another kind. Any other error says
# that the storage did not answer or did not let us in, and nothing of what it holds.
DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
# The same in words of TensorStore, of errors that have no number.
REFUSALS = ("PERMISSION_DENIED", "UNAVAILABLE", "UNAUTHENTICATED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED")


class UnreadableCheckpoint(OSError):
    """A checkpoint that is damaged, incomplete or not a checkpoint; the message is the reason."""


class InaccessibleCheckpoint(MachineFault):
    """A checkpoint that may be intact but cannot be read here and now; the message is the reason."""


def write(
    checkpointer: ocp.Checkpointer,
    path: Path,
    arrays: Mapping[str, Any],
    checksums: Mapping[str, int],
    about: Mapping[str, Any],
) -> None:
    """Writes a checkpoint; the name `path` exists only when it is complete.

    Args:
      checkpointer: one that waits for the end, or `ocp.AsyncCheckpointer`, which starts and is waited for by `finish`.
      path: directory to create; must not exist.
      arrays: by `/`-joined names, on the host, or global ones of which each process writes the shards it holds.
      checksums: of each of them.
      about: JSON-compatible description; the table of arrays is added.

    Raises:
      OSError: the storage refused, with `errno` set. Only temporary names are left behind.
    """
    size = sum(array.nbytes for array in arrays.values())
    if shutil.disk_usage(path.parent).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    table = {name: ArrayInfo(array.shape, array.dtype.name, checksums[name]) for name, array in arrays.items()}
    with _storage_errors():
        checkpointer.save(path, args=_save_args(arrays, about, table))


def finish(checkpointer: ocp.AsyncCheckpointer) -> None:
    """Waits for a `write` that was started; raises what it raises."""
    with _storage_errors():
        checkpointer.wait_until_finished()


def read_about(path: Path) -> dict[str, Any]:
    """The description of a checkpoint, with `arrays` as a table `{name: ArrayInfo}`.

    Raises:
      UnreadableCheckpoint: damaged or not a checkpoint.
      InaccessibleCheckpoint: it cannot be read here and now, or by this version.
    """
    _quiet()
    with _damage(path), _reader() as checkpointer:
        envelope = checkpointer.restore(path, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
        content = envelope["content"]
        if _json_crc32(content) != envelope["crc32"]:
            raise UnreadableCheckpoint("its description does not match its checksum")
        if content["format"] not in (1, FORMAT):
            raise InaccessibleCheckpoint(
                f"it has format {content['format']}, and this version reads formats up to {FORMAT}"
            )
        kind = "crc32" if content["format"] == 1 else "checksum"
        table = content["arrays"].items()
        content["arrays"] = {
            name: ArrayInfo(tuple(shape), dtype, **{kind: value}) for name, (shape, dtype, value, *_) in table
        }
        content["metric"] = content.get("metric") or _read_metric(path)  # it was part of the description once
        return content


def write_metric(path: Path, metric: Mapping[str, Any]) -> None:
    """Adds to a complete checkpoint how good it is, in one piece."""
    with _storage_errors():
        write_whole(path / METRIC, json_text.text(metric))


def _read_metric(path: Path) -> dict[str, Any] | None:
    """None as well where it was damaged: the checkpoint is whole without it."""
    try:
        found = json_text.read(path / METRIC)
        return {"name": str(found["name"]), "value": float(found["value"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if refusal := _refusal(error):
            raise InaccessibleCheckpoint(refusal) from error
        return None


def read_arrays(path: Path, about: Mapping[str, Any], parts: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Reads arrays to the host and verifies their checksums.

    Args:
      path: the checkpoint.
      about: its description, from `read_about`.
      parts: first components of the names to read; None reads all.

    Raises:
      UnreadableCheckpoint: damaged.
      InaccessibleCheckpoint: it cannot be read here and now.
    """
    _quiet()
    table = {name: info for name, info in about["arrays"].items() if parts is None or name.split("/")[0] in parts}
    item = _nest({name: 0 for name, info in table.items() if 0 not in info.shape})
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    with _damage(path), _reader() as checkpointer:
        args = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
        found = _flatten(checkpointer.restore(path, args=ocp.args.Composite(arrays=args)).arrays) if item else {}
        arrays = {}
        for name, info in table.items():
            array = np.zeros(info.shape, layout.dtype_of(info.dtype)) if 0 in info.shape else np.asarray(found[name])
            if not layout.matches(array, info):
                raise UnreadableCheckpoint(f"{name} does not match its checksum")
            arrays[name] = array
    return arrays


def read_shards(path: Path, about: Mapping[str, Any], shardings: Mapping[str, Sharding]) -> dict[str, jax.Array]:
    """Reads global arrays, of which each process reads the shards of its devices; `verify` looks at their checksums.

    Args:
      shardings: by name, for every array of the checkpoint.

    Raises:
      UnreadableCheckpoint: damaged.
      InaccessibleCheckpoint: it cannot be read here and now.
    """
    _quiet()
    table = {name: info for name, info in about["arrays"].items() if 0 not in info.shape}
    places = {
        name: ocp.ArrayRestoreArgs(sharding=shardings[name], dtype=layout.dtype_of(info.dtype))
        for name, info in table.items()
    }
    with _damage(path), _reader() as checkpointer:
        args = ocp.args.PyTreeRestore(item=_nest(dict.fromkeys(table, 0)), restore_args=_nest(places))
        arrays = _flatten(checkpointer.restore(path, args=ocp.args.Composite(arrays=args)).arrays)
        for name in about["arrays"].keys() - table.keys():  # Orbax keeps no arrays without elements
            info = about["arrays"][name]
            empty = np.zeros(info.shape, layout.dtype_of(info.dtype))
            arrays[name] = jax.make_array_from_callback(info.shape, shardings[name], empty.__getitem__)
        return arrays


def verify(about: Mapping[str, Any], checksums: Mapping[str, int]) -> None:
    """Compares the checksums of what was read with those of what was written.

    Raises:
      UnreadableCheckpoint: they differ.
    """
    for name, info in about["arrays"].items():
        if info.checksum not in (None, checksums[name]):
            raise UnreadableCheckpoint(f"{name} does not match its checksum")


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
    content = {**about, "format": FORMAT, "arrays": {name: list(info[:3]) for name, info in table.items()}}
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


def _reader() -> ocp.Checkpointer:
    """Reads for this process alone: with barriers, the others would wait for one whose storage fails."""
    alone = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=alone, active_processes={alone}, barrier_sync_key_prefix=f"process{alone}"
    )
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=options))
    return ocp.Checkpointer(handler, multiprocessing_options=options)


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turns whatever Orbax raises, of many types, into one line of two types: damaged, or out of reach."""
    try:
        yield
    except (UnreadableCheckpoint, InaccessibleCheckpoint, MemoryError):
        raise
    except Exception as error:
        refusal = _refusal(error) or _probe(path)
        if refusal:
            raise InaccessibleCheckpoint(refusal) from error
        reason = (str(error).splitlines() or [""])[0]
        raise UnreadableCheckpoint(f"{type(error).__name__}: {reason[:200]}") from error


def _refusal(error: BaseException | None) -> str:
    """What keeps this process from files that may be intact, as an error and its causes say it; empty if nothing."""
    while error is not None:
        code = re.search(r"os_error_code=\\?'(\d+)", str(error))
        number = int(code[1]) if code else error.errno if isinstance(error, OSError) else None
        if number and number not in DAMAGE:
            return os.strerror(number)
        if word := next((word for word in REFUSALS if str(error).startswith(word)), ""):
            return word.lower().replace("_", " ")
        error = error.__cause__ or error.__context__
    return ""


def _probe(path: Path) -> str:
    """The same from the files themselves: Orbax takes a folder that it may not enter for one that is not there, and
    what the storage refused to give for nothing.
    """
    try:
        for folder, _, names in os.walk(path, onerror=_reraise):
            for name in names:
                with open(os.path.join(folder, name), "rb", buffering=0) as file:
                    file.read(1)
    except OSError as error:
        return _refusal(error)
    return ""


def _reraise(error: OSError) -> None:
    raise error


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
