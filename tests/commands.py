"""train.py and eval.py as a user starts them, each in a process of its own that need not import anything first.

A server (`multiprocessing`'s) imports what they import, once, and is forked for every command: most of the time of a
command that fails at once would be imports.
"""

import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["train", "eval", "commands", "data", "tasks", "training.run.loop"])


def run(arguments, env=None, timeout=120, folder=ROOT):
    """`python train.py ...` in a folder, that of this repository; what it printed, and its exit code."""
    script, *rest = map(str, arguments)
    paths = os.environ.get("PYTHONPATH")
    # How the server finds what it imports; it is started by the first command.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *([paths] if paths else [])])
    try:
        with tempfile.TemporaryDirectory() as printed:
            streams = [os.path.join(printed, name) for name in ("stdout", "stderr")]
            child = _SERVER.Process(
                target=_run, args=(script.removesuffix(".py"), rest, dict(env or {}), streams, folder)
            )
            child.start()
            child.join(timeout)
            if child.is_alive():
                child.kill()
                raise subprocess.TimeoutExpired(arguments, timeout)
            found = [Path(stream).read_text() for stream in streams]
            return subprocess.CompletedProcess(arguments, child.exitcode, *found)
    finally:
        os.environ.pop("PYTHONPATH")
        if paths:
            os.environ["PYTHONPATH"] = paths


def _run(name, arguments, env, streams, folder):
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    os.environ.update(env)
    os.chdir(folder)
    sys.argv = [f"{name}.py", *arguments]
    from training.run import command

    code = command.guarded(importlib.import_module(name).main, arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
