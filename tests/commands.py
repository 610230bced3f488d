"""Python programs as a user starts them, each in a process of its own that need not import anything first.

A server (`multiprocessing`'s) imports what they import, once, and is forked for every command: most of the time of a
short one would be imports.
"""

import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import quick

ROOT = Path(__file__).resolve().parent.parent
OF_A_USER = ("train.py", "eval.py")
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["train", "eval", "commands", "data", "tasks", "training.run.loop"])


def told(text):
    """What a command printed, without the lines that say what it is doing: on a slow machine there are some."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.endswith(" ...\n"))


class Child:
    """A command that runs; like `subprocess.Popen` as far as tests need it.

    Args:
      arguments: the script, or a text of one, and what follows it.
      environment: all variables; those of this process without it.
      folder: where it runs.
    """

    def __init__(self, arguments, environment=None, folder=ROOT):
        script, *rest = self.arguments = list(map(str, arguments))
        environment = dict(os.environ if environment is None else environment)
        # Nothing else compiles for a TPU in its own process.
        if not any(option.startswith("--plan") for option in rest):
            environment["XLA_FLAGS"] = quick.flags(environment)
        # Files, because a pipe could fill up while another one is read.
        self._printed = tempfile.TemporaryDirectory()
        self._streams = [os.path.join(self._printed.name, name) for name in ("stdout", "stderr")]
        self._process = _SERVER.Process(target=_run, args=(script, rest, environment, self._streams, folder))
        paths = os.environ.get("PYTHONPATH")
        # How the server finds what it imports; it is started by the first command.
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *([paths] if paths else [])])
        try:
            self._process.start()
        finally:
            os.environ.pop("PYTHONPATH")
            if paths:
                os.environ["PYTHONPATH"] = paths
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout)
        return self.returncode

    def kill(self):
        self._process.kill()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout=None):
        """What it printed, and its errors, when it has ended."""
        try:
            self.wait(timeout)
            return [Path(stream).read_text() if os.path.exists(stream) else "" for stream in self._streams]
        finally:
            self.kill()
            self._process.join()
            self._printed.cleanup()


def run(arguments, env=None, timeout=120, folder=ROOT):
    """`python train.py ...` in a folder, that of this repository, with more variables; what it printed, and its exit
    code.
    """
    child = Child(arguments, {**os.environ, **(env or {})}, folder)
    printed = child.communicate(timeout)
    return subprocess.CompletedProcess(arguments, child.returncode, *printed)


def _run(script, arguments, environment, streams, folder):
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [script, *arguments]
    if script in OF_A_USER:
        sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        from training.run import command

        code = command.guarded(importlib.import_module(script.removesuffix(".py")).main, arguments)
    else:
        code = _execute(script)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def _execute(script):
    """As `python FILE` and `python -c TEXT` do; an error is printed as those print it."""
    named = script.endswith(".py") and "\n" not in script
    sys.path[:0] = [os.path.dirname(script) if named else "", *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    try:
        if named:
            runpy.run_path(script, run_name="__main__")
        else:
            exec(compile(script, "<text>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        return stop.code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
