"""What training scripts put around weights: dictionaries, several sets of weights, prefixes of every name.

`unwrap` takes it off, from files of every format and from mappings alike.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from models.core.errors import unknown_name

RAW, EMA = "raw", "ema"

SETS = {
    **dict.fromkeys(("model", "state_dict", "model_state_dict", "model_state", "net", "network", "module"), RAW),
    **dict.fromkeys(("weights", "params", "student", "online_model"), RAW),
    **dict.fromkeys(("model_ema", "state_dict_ema", "ema", "ema_state_dict", "ema_model"), EMA),
    **dict.fromkeys(("model_ema_state_dict", "params_ema", "teacher"), EMA),
}
"""Keys under which training scripts keep weights, and whether these are an average over steps. DINO's teacher is the
average of its student; DeepSpeed's weights are below `module`."""
PREFIXES = {*SETS, "backbone", "_forward_module"}
"""What may stand before every name: keys of `SETS` too, as attributes of Lightning's modules or where dictionaries were
flattened, and `module` of DistributedDataParallel, DataParallel and AveragedModel."""
INNER = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile, FSDP and activation checkpointing put before the names of any module, wherever it stands."""
COUNTERS = ("n_averaged", "num_updates", "decay", "initted", "step", "steps", "total_ops", "total_params")
"""Single numbers beside weights: of averages, and those that thop's profiler leaves in modules."""
AVERAGE = "/ExponentialMovingAverage"
"""What TensorFlow puts behind the name of a variable's average."""
WHICH = "which={!r}"
"""How code chooses one of several sets."""
_AVERAGE = re.compile(rf".*{AVERAGE}(:0)?")


@dataclasses.dataclass(frozen=True)
class Unwrapped:
    """Weights without wrappings.

    Attributes:
      arrays: by the names of the model that was saved.
      kind: `"ema"` for averages over training steps as far as names say, else `"raw"`.
      notes: sentences for the user: which set was taken, and what was left out.
    """

    arrays: dict[str, Any]
    kind: str
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class _Set:
    """One set of weights in a tree: the keys above it, its arrays, whether the tree holds more than it."""

    place: tuple[str, ...]
    arrays: dict[str, Any]
    beside: bool

    @property
    def label(self) -> str:
        return ".".join(self.place)

    @property
    def kind(self) -> str:
        averaged = any(SETS[key] == EMA for key in self.place) or "n_averaged" in self.arrays
        return EMA if averaged or any(map(_AVERAGE.fullmatch, self.arrays)) else RAW

    def __str__(self) -> str:
        return f"{self.label or 'one set of weights'} ({'averaged' if self.kind == EMA else 'raw'})"


def unwrap(
    tree: Any,
    which: str | None = None,
    *,
    what: str = "the mapping",
    knows: Callable[[str], bool] = lambda name: False,
    choice: str = WHICH,
) -> Unwrapped:
    """The weights in a tree of mappings whose leaves have shape and dtype.

    Dictionaries in dictionaries give dotted names, and what is no array (epoch, arguments) is left out. Prefixes go
    away if all names have them, apart from counters.

    Args:
      which: of several sets, `"raw"`, `"ema"` or its key; None where there is one.
      what: the tree, for messages.
      knows: whether a name is one of the model that is to be loaded, and so has no prefix.
      choice: how the caller's user says `which`, for messages.

    Raises:
      ValueError: several sets and `which` does not choose one of them; the line names them. Or two arrays of one name.
    """
    try:
        found = list(_sets(tree, (), False, what, knows)) if isinstance(tree, Mapping) else []
    except RecursionError:
        raise ValueError(f"{what} holds a dictionary that holds itself") from None
    if not found:
        return Unwrapped({}, RAW, [])
    chosen = _chosen(found, which, what, choice)
    arrays, kind, notes = chosen.arrays, chosen.kind, []
    if chosen.place and (chosen.beside or kind == EMA):
        others = ", ".join(other.label for other in found if other is not chosen)
        notes.append(
            f"the {'averaged ' if kind == EMA else ''}weights below {chosen.label} are taken"
            + (f", not those below {others}" if others else "")
        )
    elif "n_averaged" in arrays:
        notes.append("the weights are averaged ones: n_averaged is beside them")
    if which == RAW and (averages := [name for name in arrays if _AVERAGE.fullmatch(name)]):
        arrays, kind = {name: array for name, array in arrays.items() if name not in averages}, RAW
        notes.append(f"{len(averages)} moving averages are left out")
    counters = [name for name, array in arrays.items() if _is_counter(name, array) and not knows(name)]
    if left := sorted({name.rpartition(".")[2] for name in counters} - {"n_averaged"}):
        notes.append(f"{len(counters)} counters are left out: {', '.join(left)}")
    return Unwrapped({name: array for name, array in arrays.items() if name not in counters}, kind, notes)


def _chosen(found: list[_Set], which: str | None, what: str, choice: str) -> _Set:
    listing = ", ".join(map(str, found))
    kinds = [one.kind for one in found]
    labels = [one.label for one in found if one.label]
    fitting = [one for one in found if which in (None, one.kind, one.label)]
    if len(fitting) > 1:
        ways = [choice.format(one.kind) for one in fitting]
        if len(set(ways)) < len(ways):
            # Only code can choose among sets of one kind, by their keys.
            ways = [f"which={one.label!r}" for one in fitting]
            ways[-1] += "" if choice == WHICH else " of models.load_weights"
        raise ValueError(f"{what} holds several sets of weights: {listing}; choose by {' or '.join(ways)}")
    if which == RAW and not fitting and len(found) == 1 and any(map(_AVERAGE.fullmatch, found[0].arrays)):
        return found[0]  # each average has its variable beside it
    if not fitting and which in (RAW, EMA):
        name = "moving average" if which == EMA else "raw weights"
        raise ValueError(f"{choice.format(which)}: {what} has no {name} by its names; it holds {listing}")
    if not fitting:
        raise ValueError(f"{what}: {unknown_name('set of weights', str(which), [*dict.fromkeys(kinds), *labels])}")
    return fitting[0]


def _sets(
    tree: Mapping[Any, Any], place: tuple[str, ...], beside: bool, what: str, knows: Callable[[str], bool]
) -> Iterator[_Set]:
    """The sets of weights below some keys; those keys that are names of the model are none."""
    inner = {}
    for key, value in tree.items():
        if key in SETS and isinstance(value, Mapping):
            names = [name for name, array in _flat(value, key) if not _is_counter(name, array)]
            if names and not any(map(knows, names)):
                inner[key] = value
    for key, value in inner.items():
        yield from _sets(value, (*place, key), beside or len(tree) > 1, what, knows)
    if not inner and (arrays := _unique(((_without(name, knows), array) for name, array in _flat(tree)), what)):
        yield from _groups(arrays, place, beside, what, knows)


def _groups(
    arrays: dict[str, Any], place: tuple[str, ...], beside: bool, what: str, knows: Callable[[str], bool]
) -> Iterator[_Set]:
    """The sets of a flat dictionary, whose names may begin with their keys, without prefixes."""
    names = [name for name, array in arrays.items() if not _is_counter(name, array)]
    heads = dict.fromkeys(name.partition(".")[0] if "." in name else "" for name in names)
    alone = len(heads) == 1 and heads.keys() <= PREFIXES
    if not (alone or (heads and heads.keys() <= SETS.keys())) or any(map(knows, arrays)):
        yield _Set(place, arrays, beside)
        return
    for head in heads:
        own = [(name.removeprefix(f"{head}."), arrays[name]) for name in arrays if alone or name.startswith(f"{head}.")]
        below = (*place, head) if not alone or SETS.get(head) == EMA else place
        yield from _groups(_unique(own, what), below, beside or not alone, what, knows)


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif hasattr(tree, "shape") and hasattr(tree, "dtype"):
        yield prefix, tree


def _unique(pairs: Iterable[tuple[str, Any]], what: str) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    for name, array in pairs:
        if name in arrays:
            raise ValueError(f"{what} holds two arrays that are named {name}")
        arrays[name] = array
    return arrays


def _without(name: str, knows: Callable[[str], bool]) -> str:
    if not any(word in name for word in INNER) or knows(name):
        return name
    return ".".join(word for word in name.split(".") if word not in INNER)


def _is_counter(name: str, array: Any) -> bool:
    return name.rpartition(".")[2] in COUNTERS and math.prod(array.shape) == 1
