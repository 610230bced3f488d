"""Mechanisms by name, found in this folder: each file with `MECHANISMS` declares some.

A mechanism from outside of this project is made known by `register_mechanism`. `make_attention` is how a host makes
one: what does not fit, and what nobody takes, is said there.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from attn import Grid
from attn.core.arguments import check_rate
from models.attention.mechanism import Entry, Mechanism, spoken
from models.core.errors import keyword_options, unknown_name

ATTENTION: dict[str, Entry] = {}
"""Mechanisms by name. A name is a value of the config key `model.attention`."""


def register_mechanism(entry: Entry) -> None:
    """Makes a mechanism known. ValueError for a name that is taken."""
    if entry.name in ATTENTION:
        raise ValueError(f"attention {entry.name!r} is already registered")
    ATTENTION[entry.name] = entry


def mechanism(name: str) -> Entry:
    """The mechanism of that name. ValueError, with the nearest, if there is none."""
    if not isinstance(name, str) or name not in ATTENTION:
        raise ValueError(unknown_name("attention", str(name), ATTENTION))
    return ATTENTION[name]


def options_of(name: str) -> list[str]:
    """Options that a mechanism has."""
    return keyword_options(mechanism(name).build)


def make_attention(
    name: str,
    width: int,
    heads: int,
    *,
    shared: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    grid: Grid | None = None,
    rngs: nnx.Rngs,
) -> Mechanism:
    """The named mechanism.

    Args:
      shared: what the host says to every mechanism (`qkv_bias`, `init` ...); a mechanism takes what it has.
      options: what is said to this one; an option that it does not have is a ValueError.
      grid: that it will be called with, if it is known: one that it refuses is a ValueError now.
    """
    entry, accepted = mechanism(name), options_of(name)
    options = checked_options(name, options)
    if grid is not None and (reason := entry.declaration.refuse(spoken(entry.build), grid)):
        raise ValueError(f"attention {name!r} does not fit here: {reason}")
    known = {} if grid is None else entry.for_grid(grid)
    arguments = known | {option: value for option, value in shared.items() if option in accepted} | options
    if "dropout" in arguments:
        check_rate("dropout of attention", arguments["dropout"])
    made = entry.build(width, heads, **arguments, rngs=rngs)
    if grid is not None and (reason := made.refuse(grid)):
        raise ValueError(f"attention {name!r} does not fit here: {reason}")
    return made


def checked_options(name: str, options: Any) -> dict[str, Any]:
    """Options of a mechanism as a dictionary.

    Raises:
      ValueError: they are no mapping, or have one that the mechanism does not have.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise ValueError(f"attention_options={options!r}; allowed: a dictionary of options of {name!r}, or None")
    accepted = options_of(name)
    for option in options:
        if option not in accepted:
            raise ValueError(unknown_name(f"option of attention {name!r}", str(option), accepted))
    return dict(options)


def _find() -> None:
    for file in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if file.name.startswith("_"):
            continue
        module = importlib.import_module(f"models.attention.{file.name}")
        for entry in getattr(module, "MECHANISMS", ()):
            register_mechanism(entry)


_find()
