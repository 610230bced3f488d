"""The start of a run: fresh parameters, some or all of which come from other runs and files of weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

import configs
import data
import models
import naming
from configs import Config
from models.core.state import unrolled
from models.weights import files
from models.weights.adapt import CLASSIFIERS
from models.weights.family import FAMILIES
from models.weights.load import read
from models.weights.wrappings import EMA, RAW
from tasks.base import Task
from training.checkpoints import checkpoint, initial
from training.checkpoints import checkpoint_layout as layout
from training.distributed import mesh
from training.optim.patterns import matches, select

KEY = "config.model.init_from"
AUTO = "auto"
"""Value of `config.model.init_weights` that takes the averaged weights of a run where it has some, and the only ones of
a file."""
SHOWN = 4
Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Start:
    """One entry of `config.model.init_from`.

    Attributes:
      source: a workdir, a checkpoint or a file of weights.
      prefix: `{beginning of their names: that of ours}`, of whole words; None takes the names as they are.
      only: regular expression of our parameters that it starts; None for all that it has.
      weights: `auto`, `raw` or `ema`.
      key: what a message calls the choice of weights.
      alone: it starts the whole model, so that everything has to fit.
    """

    source: str
    prefix: Mapping[str, str] | None = None
    only: str | None = None
    weights: str = AUTO
    key: str = "config.model.init_weights"
    alone: bool = False

    def __str__(self) -> str:
        return f"{KEY}={self.source}"


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Arrays for a part of the model ("" for all of it), by their names within it."""

    part: str
    params: Arrays
    state: Arrays


def of_config(config: Config) -> tuple[Start, ...]:
    """The entries of `config.model.init_from`, in order.

    Raises:
      ValueError: `config.model.init_weights` without any.
    """
    given, which = config.model.init_from, config.model.init_weights
    if not given:
        if which != AUTO:
            raise ValueError(f"config.model.init_weights={which}: needs {KEY}")
        return ()
    found = []
    for entry in (given,) if isinstance(given, str) else given:
        keys = {"source": entry} if isinstance(entry, str) else dict(entry)
        named = {"key": f"{KEY}: weights"} if "weights" in keys else {"weights": which}
        found.append(Start(**keys, **named))
    alone = len(found) == 1 and found[0].prefix is None and found[0].only is None
    return tuple(dataclasses.replace(start, alone=alone) for start in found)


def check(starts: Iterable[Start], params: Mapping[str, Any]) -> None:
    """Refuses what cannot be started, before anything is read.

    Args:
      params: of the model, shapes by name.

    Raises:
      FileNotFoundError: a source is not there.
      ValueError: a part or a pattern of our names that there is not; names the nearest.
    """
    names = list(unrolled(params))
    for start in starts:
        initial.find(start.source)
        for ours in (start.prefix or {}).values():
            _need(ours, names, f"{start}: prefix: the model has nothing that begins with")
        if start.only is not None:
            select(f"{start}: only", (start.only,), params)


def start_from(
    starts: Iterable[Start],
    task: Task,
    params: Mapping[str, jax.Array],
    model_state: Mapping[str, jax.Array],
    model: nnx.Module,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Starts a fresh model from saved weights and files of official ones.

    What can be adapted (`models.adapt`, and what weights mean to the task) is adapted and said on stderr, as is which
    of several weights are taken, and what starts anew. Where one part of a model is of a family and the model is not,
    as the backbone of a detector, weights of that family go to this part.

    Args:
      starts: from `of_config`; each parameter is started by at most one of them.
      task: of the run; knows what weights mean in it.
      params, model_state: the fresh ones.
      model: knows what may be adapted.

    Returns:
      Parameters and model state in the layout of the fresh ones, whole and on the host in every process.

    Raises:
      ValueError: something does not fit, or would be started twice; one line that names it.
    """
    fresh, fresh_state = mesh.gather((dict(params), dict(model_state)))
    own = models.merge(models.split(model)[0], fresh, fresh_state)
    before = {**models.unstack(fresh), **models.unstack(fresh_state)}
    values, by, alone = dict(before), dict[str, Start](), False
    for start in starts:
        alone |= start.alone
        try:
            found, anew, notes = _read(start, task, own, before)
            if not start.alone:
                found, said = _of_ours(start, found, anew, before)
                notes += said
        except ValueError as error:
            raise ValueError(f"{start}: {error}") from error
        if twice := next((name for name in found if name in by), None):
            raise ValueError(
                f"{start}: {twice} is started by {by[twice].source} already; each parameter is started once, and "
                "'only' says by which"
            )
        by |= dict.fromkeys(found, start)
        values = found if start.alone else values | found
        initial.say(f"init_from {start.source}", notes)
    if not alone and (left := [name for name in before if name not in by]):
        initial.say("init_from", [f"{len(left)} of {len(before)} parameters start anew: {_some(left)}"])
    where = KEY if not alone else str(next(iter(by.values())))
    state = {name: value for name, value in values.items() if name in models.unstack(fresh_state)}
    rest = {name: value for name, value in values.items() if name not in state}
    return initial.fit(rest, fresh, where), initial.fit(state, fresh_state, where)


def _read(
    start: Start, task: Task, own: nnx.Module, before: Mapping[str, np.ndarray]
) -> tuple[Arrays, set[str], list[str]]:
    """What a source has, adapted to the model, by our unrolled names, and which classifiers start anew all the same;
    one that is alone has these too, and all that is not of its part.
    """
    reading = _of_file if files.is_weight_file(start.source) else _of_checkpoint
    pieces, theirs, notes = reading(start, task, own)
    found, anew = Arrays(), set[str]()
    for piece in pieces:
        inside = _within(piece.part, before)
        loaded, said = task.starting(piece.params, inside, theirs)
        notes += said
        if not start.alone:
            fresh = [name for name, value in loaded.items() if _is_anew(name, value, inside)]
            anew |= {_under(piece.part, name) for name in fresh}
            loaded = {name: value for name, value in loaded.items() if name not in fresh}
        found |= {_under(piece.part, name): value for name, value in (loaded | piece.state).items()}
    if start.alone and (part := pieces[0].part):
        found = {name: value for name, value in before.items() if not name.startswith(f"{part}.")} | found
        notes.append(f"the weights go to {part}; the rest starts anew")
    return found, anew, notes


def _of_file(start: Start, task: Task, own: nnx.Module) -> tuple[list[_Piece], data.Info, list[str]]:
    known = _known_parts(own)
    if start.prefix is None:
        if len(known) > 1:
            raise ValueError(
                f"it is for a part of the model: prefix={{'': {known[0]!r}}} (there are {', '.join(known)})"
            )
        part = known[0] if known else ""
    elif list(start.prefix) == [""]:
        part = start.prefix[""]
    else:
        raise ValueError(
            f"prefix={dict(start.prefix)}: official weights are for a whole model of their family; takes {{'': PART}}"
        )
    if (target := _module(own, part)) is None:
        raise ValueError(f"prefix: {part!r} is no part of the model that can be of a family")
    which = None if start.weights == AUTO else start.weights
    found = read(target, start.source, which, choice=f"{start.key}={{}}")
    params, state, notes = models.convert_weights(target, found)
    return [_Piece(part, params, state)], task.info_of_file(found, target), notes


def _of_checkpoint(start: Start, task: Task, own: nnx.Module) -> tuple[list[_Piece], data.Info, list[str]]:
    saved = checkpoint.restore_for_eval(start.source)
    if start.weights == EMA and not saved["ema"]:
        raise ValueError(f"{start.key}=ema: it has no moving average (the run had optim.ema=0)")
    loaded, state = initial.weights(saved, start.weights != RAW)
    notes = []
    if saved["ema"]:
        taken, other = ("raw", "averaged") if start.weights == RAW else ("averaged", "raw")
        notes.append(f"the {taken} weights are taken, not the {other} ones")
    if start.prefix is None:
        known = _known_parts(own)
        part = known[0] if len(known) == 1 else ""
        if any(name.startswith(f"{part}.") for name in loaded):  # of a model that has the part as well
            part = ""
        pieces = [_Piece(part, loaded, state)]
    else:
        pieces = _renamed(start.prefix, loaded, state)
    trained = configs.from_dict(saved["config"])
    adapted = []
    for piece in pieces:
        target, params = _module(own, piece.part), piece.params
        if target is not None:
            fresh = models.unstack(models.split(target)[1])
            params, said = task.adapted(target, params, fresh, trained)
            notes += said
        adapted.append(dataclasses.replace(piece, params=params))
    notes += task.other_inputs(trained)
    return adapted, initial.saved_info(saved), notes


def _renamed(prefix: Mapping[str, str], loaded: Arrays, state: Arrays) -> list[_Piece]:
    """Their arrays by the longest beginning of their name that is known; what begins with none is left."""
    names = [*loaded, *state]
    for theirs in prefix:
        _need(theirs, names, "prefix: it has nothing that begins with")
    longest = {name: max((one for one in prefix if _begins(name, one)), key=len, default=None) for name in names}
    return [
        _Piece(
            ours,
            *(
                {_rest(name, theirs): value for name, value in flat.items() if longest[name] == theirs}
                for flat in (loaded, state)
            ),
        )
        for theirs, ours in prefix.items()
    ]


def _of_ours(start: Start, found: Arrays, anew: set[str], before: Mapping[str, np.ndarray]) -> tuple[Arrays, list[str]]:
    """Of what a source has, what the model has too and the entry is meant to start; and what is left out, in words."""
    mine = {name: value for name, value in found.items() if name in before}
    notes = []
    if start.only is not None:
        wanted = [name for name in before if matches(start.only, name) and name not in anew]
        if missing := [name for name in wanted if name not in found]:
            near = naming.hint(missing[0], found)
            raise ValueError(f"only={start.only!r} names {missing[0]}, which it does not have{near}")
        mine = {name: found[name] for name in wanted}
    if not mine:
        raise ValueError(f"it has nothing that the model has: {_some(found)} there, {_some(before)} here")
    if other := [name for name in found if name not in before]:
        notes.append(f"{len(other)} of its parameters have no place here: {_some(other)}")
    shapes = (
        {name: layout.ArrayInfo(flat[name].shape, flat[name].dtype.name) for name in mine} for flat in (mine, before)
    )
    if different := layout.difference(*shapes):
        raise ValueError(f"the weights do not fit the model: {different}")
    return mine, notes


# --- names ------------------------------------------------------------------------------------------------------------


def _begins(name: str, part: str) -> bool:
    return not part or name == part or name.startswith(f"{part}.")


def _rest(name: str, part: str) -> str:
    return name[len(part) :].lstrip(".") if part else name


def _under(part: str, name: str) -> str:
    return ".".join(filter(None, (part, name)))


def _within(part: str, flat: Mapping[str, Any]) -> Arrays:
    return {_rest(name, part): value for name, value in flat.items() if _begins(name, part)}


def _need(part: str, names: Iterable[str], what: str) -> None:
    if not any(_begins(name, part) for name in names):
        parts = {
            ".".join(words[:depth]) for words in (n.split(".") for n in names) for depth in range(1, len(words) + 1)
        }
        raise ValueError(f"{what} {part!r}{naming.hint(part, sorted(parts), cutoff=0.0)}")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


# --- parts ------------------------------------------------------------------------------------------------


def _module(model: nnx.Module, path: str) -> nnx.Module | None:
    """The module at a dotted path; None where there is none, as for one layer of a scanned stack."""
    found: Any = model
    for word in filter(None, path.split(".")):
        try:
            found = found[int(word)] if word.isdigit() else getattr(found, word)
        except (AttributeError, IndexError, KeyError, TypeError):
            return None
    return found if isinstance(found, nnx.Module) else None


def _known_parts(model: nnx.Module) -> list[str]:
    """The attributes of a model without a family that are models of one."""

    def known(module: Any) -> bool:
        return any(isinstance(module, family.model) for family in FAMILIES.values())

    return [] if known(model) else [name for name, value in vars(model).items() if known(value)]


def _is_anew(name: str, value: Any, before: Mapping[str, np.ndarray]) -> bool:
    """Whether it is a classifier that has its fresh values."""
    return name.split(".")[0] in CLASSIFIERS and name in before and np.array_equal(value, before[name])
