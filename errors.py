"""Errors by what can be done about them, and the code that a command leaves with for each.

Schedulers act on the code (`deploy/`, docs/pods.md): what the same command, started again, may get past is not told
apart from what it cannot by a builtin class, since libraries and Python itself raise those for anything. So:

* the classes below say what they are;
* the operating system says it by `errno`: a full disk is one of the machine, a missing file is not;
* a builtin error counts as one about the input only where a `raise` of this repository made it, with words of its own;
* anything else is a fault, told with its place: in a file of the user's if it came by one, else in one of ours.
"""

from __future__ import annotations

import dis
import errno
import sysconfig
from collections.abc import Callable
from pathlib import Path

INTERNAL, INPUT, MACHINE, AGAIN, INTERRUPTED = 1, 2, 74, 75, 130
MEANING = {
    0: "done",
    INTERNAL: "a fault of this code",
    INPUT: "something has to be changed first: configuration, data, a file of the user's, or a run that is not finite",
    MACHINE: "the machine, the network or the storage failed: disk full, data worker killed, a process that never came",
    AGAIN: "the run was asked to stop, or lost a process: the same command continues it",
    INTERRUPTED: "Ctrl-C",
}
"""Exit code -> what it says. 74 and 75 are EX_IOERR and EX_TEMPFAIL of sysexits.h."""

OURS = (
    "attn",
    "kernels",
    "models",
    "configs",
    "data",
    "naming",
    "tasks",
    "training",
    "train.py",
    "eval.py",
    "errors.py",
)
ROOT = Path(__file__).resolve().parent
INSTALLED = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib"))
OF_INPUT = (ValueError, KeyError, OSError, FloatingPointError)
OF_MACHINE = frozenset(
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EIO", "ESTALE", "EREMOTEIO", "ENODEV", "ENOMEM", "ENFILE", "EMFILE", "EAGAIN", "EBUSY"),
        *("ETIMEDOUT", "ECONNREFUSED", "ECONNRESET", "ECONNABORTED", "EPIPE", "ENOTCONN", "ESHUTDOWN", "EADDRINUSE"),
        *("ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH"),
    )
    if hasattr(errno, name)  # not every system has every one
)


class BadInput(ValueError):
    """What was given cannot work; starting again changes nothing."""

    exit_code = INPUT


class FileOfUser(BadInput):
    """A Python file that was given is at fault; the message begins with `FILE:LINE: `."""


class MachineFault(OSError):
    """The machine, the network or the storage failed; the same command may well work, there or elsewhere."""

    exit_code = MACHINE


class WorkerLost(MachineFault, ChildProcessError):
    """A process that makes batches died or was killed."""


class ProcessMissing(MachineFault):
    """Processes of a run did not find each other in time, or do not see the same files yet."""


def judge(error: BaseException) -> tuple[int, str]:
    """The code to leave with, and the error in one line: of a fault with its place, `my_task.py:12: TypeError: ...`."""
    code, message = getattr(error, "exit_code", None), _message(error)
    if isinstance(code, int):
        return code, message
    if isinstance(error, OSError) and error.errno is not None:
        return (MACHINE if error.errno in OF_MACHINE else INPUT), message
    if isinstance(error, OF_INPUT) and (type(error).__module__.partition(".")[0] in OURS or _made_here(error)):
        return INPUT, message
    code, place = INPUT, _place(error, _is_users)
    if not place:
        code, place = INTERNAL, _place(error, _is_ours)
    return code, f"{place}{': ' if place else ''}{type(error).__name__}: {message}"


def in_file(error: BaseException, file: Path, kind: bool = True) -> str:
    """What went wrong while Python ran `file`, as `FILE:LINE: TYPE: message` in one line.

    Args:
      kind: whether the type is said; not that of an error whose message is whole by itself.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{short(error.filename)}:{error.lineno}: {type(error).__name__}: {error.msg}"
    place = _place(error, lambda name: Path(name).resolve() == file.resolve()) or short(str(file))
    return f"{place}: {f'{type(error).__name__}: ' if kind else ''}{_message(error)}"


def _message(error: BaseException) -> str:
    text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(str(text).split()) or type(error).__name__


def _made_here(error: BaseException) -> bool:
    """Whether a `raise` statement in a file of this repository made it: neither Python nor a library below."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not _is_ours(trace.tb_frame.f_code.co_filename):
        return False
    return trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _place(error: BaseException, counts: Callable[[str], bool]) -> str:
    """The innermost `FILE:LINE` in a file that counts; empty if there is none."""
    found, trace = "", error.__traceback__
    while trace is not None:
        if counts(name := trace.tb_frame.f_code.co_filename):
            found = f"{short(name)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def short(name: str) -> str:
    """The name of a file as one types it from here: without the current folder, where it lies below it."""
    path = Path(name).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else name


def _is_ours(name: str) -> bool:
    path = Path(name).resolve()
    return path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in OURS


def _is_users(name: str) -> bool:
    """A file that is neither ours nor installed."""
    path = Path(name).resolve()
    return path.is_file() and not _is_ours(name) and not any(map(path.is_relative_to, INSTALLED))
