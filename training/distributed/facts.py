"""What all processes of a run have to have in common: the configuration, the code and the packages it runs on.

Otherwise each takes steps of its own, and the parameters that come out are those of no run.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import subprocess
import tomllib
from collections.abc import Mapping
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import errors
import naming

OF_A_MACHINE = (
    "config.data.directory",
    "config.data.cache",
    "config.data.workers",
    "config.data.threads",
    "config.data.prefetch",
    "config.log.cache_directory",
)
"""Keys that say where a machine has its files and how it reads them."""
SHOWN = 3
LONGEST = 120


def versions() -> dict[str, str]:
    """Versions of Python, of Fovea and of the packages that a checkpoint depends on."""
    found = {"python": platform.python_version(), "fovea": release()}
    return found | {package: _version(package) for package in ("jax", "flax", "optax", "orbax-checkpoint")}


def _version(package: str) -> str:
    try:
        return packages.version(package)
    except packages.PackageNotFoundError:
        return "not installed"


def devices() -> str:
    """The devices that programs run on: how many, of what kind, of what platform."""
    import jax  # here, as what JAX reads once is set after this module was read

    device = jax.devices()[0]
    return f"{len(jax.devices())} x {device.device_kind} ({device.platform})"


@functools.cache
def release() -> str:
    """The version of this checkout; `unknown` where its pyproject.toml was left behind.

    No installed package says it: the one that is called `fovea` on PyPI is another project.
    """
    try:
        return str(tomllib.loads((errors.ROOT / "pyproject.toml").read_text())["project"]["version"])
    except (OSError, ValueError, KeyError):
        return "unknown"


@functools.cache
def commit() -> str:
    """The commit of this checkout, with `+changes` where files differ from it; empty outside of git."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).resolve().parent
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return ""
        return done.stdout.strip()

    head = git("rev-parse", "HEAD")
    return head + ("+changes" if head and git("status", "--porcelain", "--untracked-files=no") else "")


def code() -> str:
    """Eight digits that name the source files, whether they are committed or not, and the commit."""
    found = hashlib.sha256()
    for name in errors.OURS:
        place = errors.ROOT / name
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            found.update(str(path.relative_to(errors.ROOT)).encode() + b"\0" + path.read_bytes())
    return f"{found.hexdigest()[:8]} of commit {commit()[:12] or 'unknown'}"


def facts(given: Mapping[str, Any]) -> dict[str, str]:
    """All of it by name; a long value is cut, and named by a hash of the whole.

    Args:
      given: what the command of this process was given, by name.
    """
    found = {name: str(value) for name, value in given.items() if name not in OF_A_MACHINE}
    found |= {
        f"the file of {name}": naming.fingerprint(text) for name, text in found.items() if naming.is_outside(text)
    }
    found |= {"the code": code(), **{f"the version of {name}": value for name, value in versions().items()}}
    return {name: value if len(value) <= LONGEST else _cut(value) for name, value in found.items()}


def _cut(value: str) -> str:
    return f"{value[:LONGEST]}... ({hashlib.sha256(value.encode()).hexdigest()[:8]})"


def difference(process: str, its: Mapping[str, str], own: Mapping[str, str]) -> str:
    """One line about what differs from process 0; empty where nothing does.

    Args:
      process: what the line calls the other one.
      its, own: the facts of that process, and those of process 0.
    """
    names = [name for name in {**own, **its} if its.get(name) != own.get(name)]
    if not names:
        return ""
    said = [f"{name} is {its.get(name, 'not there')} for {own.get(name, 'nothing')}" for name in names[:SHOWN]]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (
        f"{process} differs from process 0: {'; '.join(said)}{more}; start all processes with the same command, code "
        "and packages"
    )
