"""What the commands share: setting up JAX, and turning errors into one line and an exit code."""

from __future__ import annotations

import argparse
import importlib.util
import io
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import configs
import errors
import naming
from naming import command_line
from training.distributed import facts, launch, processes
from training.run import completion
from training.run.terminal import Terminal

GPU_NODES = ("nvidia0", "nvidiactl", "dxg", "kfd")  # NVIDIA, NVIDIA in containers, WSL, AMD
THREADS = 8  # of XLA, for each device that a CPU stands for


class Parser(command_line.Parser):
    """The command line of `train.py` or `eval.py`, which knows what a word that lacks its `--config` meant."""

    def with_shared_flags(self) -> Parser:
        """The same, with the flags that both commands have behind its own."""
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")
        self.add_argument("--version", action=_Version, help="print version, commit and JAX's version, and stop")
        self.add_argument(
            "--completion",
            choices=completion.SHELLS,
            help=f'print a script that completes this command: eval "$(python {self.prog} --completion=bash)"',
        )
        processes.add_flags(self)
        return self

    def advice(self, word: str) -> str:
        """As that of every command line, but for a key of the configuration, an experiment or its file."""
        name, given, value = word.partition("=")
        if not name.startswith("-") and not given and (name.endswith(".py") or name in configs.names()):
            return f" (did you mean --config={name}?)"
        key, keys = name.lstrip("-"), configs.keys()
        group, dot, last = key.rpartition(".")
        known = [key] if key in keys else [one for one in keys if one.endswith(f".{key}")]
        if dot and not known and any(one.startswith(f"{key.partition('.')[0]}.") for one in keys):
            beside = {one.rpartition(".")[2]: one for one in keys if one.startswith(f"{group}.")}
            known = [beside[near] for near in naming.close(last, beside, most=1)] or [key]
        if known:
            return f"; a key of the configuration is set by --config.{known[0]}={value or 'VALUE'}"
        return super().advice(word)


class _Version(argparse.Action):
    """Finds out only when it is asked for: the commit takes a moment."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any) -> None:
        known = facts.versions()
        others = ", ".join(f"{name} {known[name]}" for name in ("jax", "flax", "python"))
        command_line.show(f"fovea {known['fovea']}, commit {facts.commit() or 'unknown'}, {others}")
        parser.exit()


def start_jax(
    cache_directory: str, options: argparse.Namespace | None = None, given: Mapping[str, Any] | None = None
) -> launch.Launch:
    """Sets up JAX before its first use: the other processes of the run, a persistent compilation cache, and no chatter
    from libraries.

    Args:
      options: the flags of `processes.add_flags`, for the first call of a command.
      given: what the command was given, by name, on which several processes have to agree.

    Returns:
      Who this process is.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if only_cpu():
        # With libtpu installed, JAX would look for a TPU on every start, and complain.
        os.environ["JAX_PLATFORMS"] = "cpu"
    give_threads(os.environ)
    with terminal().busy("importing JAX"):
        import jax

    for name in ("absl", "orbax", "jax", "grain"):
        logging.getLogger(name).setLevel(logging.ERROR)
    started = launch.Launch()
    if options is not None:
        started = processes.start(options, given)
        if started.processes > 1:
            _keep_quiet(started)
    if cache_directory:
        folder = Path(cache_directory).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            print(f"no compilation cache: {folder}: {error.strerror}", file=sys.stderr)
            return started
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return started


def terminal() -> Terminal:
    """Where a command shows what it does; only the first process of a run does."""
    return Terminal(quiet=not processes.is_first())


def began() -> float:
    """When this process began, before its imports, by `time.perf_counter`; now, where the system does not tell."""
    now = time.perf_counter()
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return now - max(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 0.0)
    except (OSError, ValueError, IndexError, AttributeError):
        return now


def _keep_quiet(started: launch.Launch) -> None:
    """Leaves the stdout of the run to Python in process 0.

    That of C is dropped: Gloo, by which CPU processes talk, reports every connection there.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    kept = os.dup(1) if started.process == 0 else nowhere
    sys.stdout = open(kept, "w", buffering=1, encoding=sys.stdout.encoding)  # noqa: SIM115 - open to the end
    os.dup2(nowhere, 1)


def only_cpu() -> bool:
    """Whether JAX would look for a TPU, with the libtpu of the extra `plan`, on a machine with neither TPU nor GPU."""
    if os.environ.get("JAX_PLATFORMS") or "jax" in sys.modules or importlib.util.find_spec("libtpu") is None:
        return False
    forced = any(os.environ.get(name) for name in ("JAX_FORCE_TPU_INIT", "TPU_NAME", "TPU_WORKER_ID"))
    return not (forced or launch.has_tpu() or any(os.path.exists(f"/dev/{name}") for name in GPU_NODES))


def give_threads(environment: MutableMapping[str, str]) -> None:
    """Gives a CPU that stands for several devices more threads than XLA would, before JAX touches it.

    XLA has one thread for each device, and a collective holds its thread until the other devices are there. A device
    that waits in two collectives at once takes the thread of another, which then never comes: a run on eight devices
    of a busy CPU stopped like this every second time, and never with eight threads for each device.
    """
    asked = re.findall(r"--xla_force_host_platform_device_count=(\d+)", environment.get("XLA_FLAGS", ""))
    devices = max(map(int, [*asked, environment.get("JAX_NUM_CPU_DEVICES") or 1]))
    if devices > 1:
        environment.setdefault("PJRT_NPROC", str(max(THREADS * devices, os.cpu_count() or 1)))


def guarded(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Runs `main`; an error becomes one line on stderr, with the traceback only under `--debug`.

    Returns:
      What `main` returns, or one of `errors.MEANING`.
    """
    from training.distributed.preemption import Preempted, Signals, still_working

    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        # What may not be cut short, such as a run after its first step, says so itself.
        with Signals() as signals, signals.at_once("before anything was written; the same command starts again"):
            code = main(arguments)
        processes.finish()
    except Preempted as stop:
        code = stop.exit_code
        if not stop.together:
            processes.failed(str(stop), code, str(stop), others=errors.AGAIN)
        else:
            if processes.is_first():
                print(stop, file=sys.stderr)
            processes.finish()
    except KeyboardInterrupt:
        code = errors.INTERRUPTED
        processes.failed("interrupted", code, "interrupted", others=errors.AGAIN)
    except Exception as error:
        code, line = errors.judge(error)
        text = f"internal error: {line} (--debug shows how)" if code == errors.INTERNAL else f"error: {line}"
        report = traceback.format_exc().rstrip() if "--debug" in arguments else text
        processes.await_loss(error)
        processes.failed(text, code, report)
    if still_working():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
