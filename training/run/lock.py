"""One run at a time in a workdir.

The first process holds a POSIX record lock on `WORKDIR/lock` as long as it lives. The system takes it back when the
process ends, however it ends; processes that it started do not inherit it; and NFS and the usual cluster file systems
keep it for all machines. The file says who holds it, for the message and for file systems without locks.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import time
from pathlib import Path
from typing import IO, Any

from errors import MachineFault
from training.checkpoints import json_text
from training.checkpoints.whole import set_aside

NAME = "lock"
HELD = (errno.EACCES, errno.EAGAIN)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
SECONDS_HERE = 5.0  # in which a process that was told to end does so
SECONDS_ELSEWHERE = 100.0  # after which an NFS server gives up a machine that is gone, and its locks (RFC 7530: 90 s)


class WorkdirInUse(MachineFault):
    """Another run works in the workdir."""


class Lock:
    """Held from construction until `close`, or the end of the process.

    Raises:
      WorkdirInUse: another process holds it and lives.
    """

    def __init__(self, workdir: Path):
        path = workdir / NAME
        if path.is_dir():
            set_aside(path)
        self._file: IO[str] = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - open as long as it is held
        begin, said = time.monotonic(), False
        while not self._take(workdir):
            holder = self._holder()
            elsewhere = holder.get("host") != socket.gethostname()
            if time.monotonic() - begin > (SECONDS_ELSEWHERE if elsewhere else SECONDS_HERE):
                self._file.close()
                raise WorkdirInUse(
                    f"--workdir={workdir}: another run works here (process {holder.get('pid', '?')} on "
                    f"{holder.get('host', 'another machine')}, since {holder.get('since', '?')}); wait for it, or use "
                    "another workdir"
                )
            if elsewhere and not said:
                print(f"{workdir}: waiting for a run on {holder.get('host', 'another machine')}", file=sys.stderr)
                said = True
            time.sleep(0.2)
        self._file.truncate(0)
        self._file.write(json_text.text(_self()))
        self._file.flush()

    def _take(self, workdir: Path) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                return False
            if error.errno not in NO_LOCKS:
                raise OSError(f"--workdir={workdir}: cannot be locked: {os.strerror(error.errno or 0)}") from error
            holder = self._holder()
            if holder.get("host") == socket.gethostname() and _lives(holder):
                return False
            print(f"{workdir}: its file system has no locks; a second run would not be noticed", file=sys.stderr)
        return True

    def _holder(self) -> dict[str, Any]:
        try:
            self._file.seek(0)
            return json_text.parse(self._file.read())
        except (OSError, ValueError):
            return {}

    def close(self) -> None:
        """Gives the lock up. The file stays: whoever waits for it has it open."""
        if not self._file.closed:
            self._file.truncate(0)
            self._file.close()


def _self() -> dict[str, Any]:
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"host": socket.gethostname(), "pid": os.getpid(), "began": _began(os.getpid()), "since": since}


def _lives(holder: dict[str, Any]) -> bool:
    """Whether the process of a lock file is there; a later one with its number began at another time."""
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid == os.getpid():
        return False
    began = _began(pid)
    return began is not None and began == holder.get("began")


def _began(pid: int) -> int | None:
    """When a process of this machine began, in ticks since it was started; None if it is not there, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
