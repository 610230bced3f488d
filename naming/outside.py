"""Tasks, data sets and models that are not part of this repository, by the name `module:Object`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

import errors
from naming.nearest import hint

_FORM = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_outside(name: str) -> bool:
    """Whether a name has the form `package.module:Object`."""
    return _FORM.fullmatch(name) is not None


def load(name: str, what: str) -> Any:
    """The object that `name` stands for, imported from the Python path or from the current folder.

    Args:
      name: `package.module:Object`.
      what: where the name was given, for messages, such as `"config.task.name"`.

    Raises:
      ValueError: no such module or object; one line that names the nearest, or the file and line of an error in it.
    """
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # an installed command starts with its own folder instead
    try:
        module: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent and (module_name == absent or module_name.startswith(f"{absent}.")):
            raise ValueError(
                f"{what}={name!r}: there is no module {absent!r} on the Python path or in {os.getcwd()}"
            ) from error
        if isinstance(error, SyntaxError) and error.filename:
            said = errors.in_file(error, Path(error.filename))
        else:
            said = errors.judge(error)[1]
        raise errors.FileOfUser(f"{what}={name!r}: {said}") from error
    if not hasattr(module, attribute):
        near = hint(attribute, [n for n in vars(module) if not n.startswith("_")])
        raise ValueError(f"{what}={name!r}: {module_name} has no {attribute!r}{near}")
    return getattr(module, attribute)


def fingerprint(name: str) -> str:
    """Eight digits that name what is in the file of a module; `no file` where there is none. Nothing is run."""
    module = name.partition(":")[0]
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.origin or not os.path.isfile(spec.origin):
        return "no file"
    with open(spec.origin, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()[:8]
