"""One wording for names and options that nothing is known by."""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence

import naming


def unknown_name(kind: str, name: str, allowed: Iterable[str], near: Sequence[str] | None = None) -> str:
    """One line: the name, what is nearest, and what is allowed (shortened past a dozen).

    Args:
      near: what is nearest, where the caller knows better than the likeness of letters.
    """
    allowed = list(allowed)
    close = naming.close(name, allowed, cutoff=0.4) if near is None else near
    nearest = f"; nearest: {', '.join(close)}" if close else ""
    shown = ", ".join(allowed[:12]) + (f" and {len(allowed) - 12} more" if len(allowed) > 12 else "")
    return f"unknown {kind} {name!r}{nearest}; allowed: {shown}"


def keyword_options(build: Callable) -> list[str]:
    """Keyword-only arguments of a function or class, `rngs` left out: what a user may say to it."""
    while isinstance(build, functools.partial):
        build = build.func
    # The signature of an NNX class is that of its metaclass; the options are those of its constructor.
    function = inspect.getattr_static(build, "__init__") if isinstance(build, type) else build
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "rngs"]
