"""The folder of this machine for what is made once from the data of others, and how to make it once."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


def cache_directory() -> Path:
    """Where prepared sets live unless `data.directory` says otherwise: $FOVEA_CACHE, or ~/.cache/fovea."""
    return Path(os.environ.get("FOVEA_CACHE") or Path.home() / ".cache" / "fovea")


@contextlib.contextmanager
def exclusive(home: Path, name: str) -> Iterator[None]:
    """Lets one process at a time prepare a set; the lock dies with its process."""
    home.mkdir(parents=True, exist_ok=True)
    with open(home / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def made_from(file: Path, kind: str, ending: str, make: Callable[[Path], None]) -> Path:
    """What `make(place)` writes from a file, kept in the cache until the file changes.

    Args:
        file: the original.
        kind: a folder of the cache.
        ending: of the name.
        make: writes what is wanted to the path it is given. It appears under its name only when it is whole.
    """
    known = file.stat()
    text = f"{file.resolve()}\0{known.st_size}\0{known.st_mtime_ns}"
    name = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=12).hexdigest()
    home = cache_directory() / kind
    place = home / f"{name}{ending}"
    if place.exists():
        return place
    with exclusive(home, name):
        if not place.exists():
            handle, scratch = tempfile.mkstemp(prefix=f".{name}-", suffix=ending, dir=home)
            os.close(handle)
            try:
                make(Path(scratch))
                os.replace(scratch, place)
            finally:
                Path(scratch).unlink(missing_ok=True)
    (home / f".{name}.lock").unlink(missing_ok=True)
    return place
