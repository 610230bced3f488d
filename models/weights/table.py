"""Tables that map another project's parameter names and layouts to ours, and back.

A table is a list of rows, made by kind: `linear("blocks.{}.attn.qkv")`, `conv("patch_embed.proj", "patch_embed")`. `{}`
stands for a number. Names are matched from our side: the model says which of its parameters there are, and each has to
be claimed by exactly one row. So the same rows serve models with and without biases, and nothing is left to order.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from models.core.errors import unknown_name

Arrays = list[np.ndarray]
Flat = dict[str, np.ndarray]
Names = str | Sequence[str]

_NUMBER = re.compile(r"\{\}|\d+")


@dataclasses.dataclass(frozen=True)
class Row:
    """Arrays of theirs that hold the same numbers as some of ours.

    Attributes:
      theirs, ours: names; both have the same number of `{}`, in the same order.
      to_ours: `(their arrays, last-axis sizes of ours) -> our arrays`; the sizes are for what one array is cut into.
      to_theirs: its inverse, from our arrays.
      constants: entries of theirs without a counterpart here, passed over when read and written as they stand.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    to_ours: Callable[[Arrays, Sequence[int]], Arrays]
    to_theirs: Callable[[Arrays], Arrays]
    constants: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        names = (*self.theirs, *self.ours, *self.constants)
        if len({name.count("{}") for name in names}) != 1:
            raise ValueError(f"weight table: the names of a row differ in their numbers {{}}: {', '.join(names)}")
        if not self.ours and "{}" in names[0]:
            raise ValueError(f"weight table: {names[0]}: a constant for any number cannot be written")


# --- kinds of rows ----------------------------------------------------------------------------------------------------


def copy(theirs: str, ours: str | None = None) -> Iterator[Row]:
    """One array, as it is; names like theirs unless given."""
    yield _row(theirs, ours or theirs, _same, _same)


def linear(theirs: Names, ours: Names | None = None) -> Iterator[Row]:
    """`torch.nn.Linear`: weight `[out, in]` to kernel `[in, out]`, and the bias.

    Several of theirs for one of ours (or the other way round) are its concatenation along the output axis; several of
    theirs are of equal size.
    """
    yield from _module(theirs, ours, {"weight": "kernel"}, np.transpose, np.transpose)
    yield from _module(theirs, ours, {"bias": "bias"}, _same, _same)


def conv(theirs: Names, ours: Names | None = None) -> Iterator[Row]:
    """A convolution of any rank, grouped or depthwise: weight `[out, in / groups, *k]` to kernel
    `[*k, in / groups, out]`, and the bias.
    """
    yield from _module(theirs, ours, {"weight": "kernel"}, _channels_last, _channels_first)
    yield from _module(theirs, ours, {"bias": "bias"}, _same, _same)


def pointwise(theirs: Names, ours: Names | None = None) -> Iterator[Row]:
    """A 2-D convolution of single places that is a linear layer here: weight `[out, in, 1, 1]` to kernel `[in, out]`,
    and the bias.
    """
    yield from _module(theirs, ours, {"weight": "kernel"}, _without_places, _with_places)
    yield from _module(theirs, ours, {"bias": "bias"}, _same, _same)


def norm(theirs: str, ours: str | None = None) -> Iterator[Row]:
    """Layer, group or RMS normalization: weight to scale, and the bias."""
    yield from _module(theirs, ours, {"weight": "scale", "bias": "bias"}, _same, _same)


def batch_norm(theirs: str, ours: str | None = None) -> Iterator[Row]:
    """Batch normalization: `norm`, and running mean and variance to mean and var (state, not parameters).

    The count of batches is passed over: it matters to cumulative averages only.
    """
    yield from norm(theirs, ours)
    yield _row(f"{theirs}.running_mean", f"{ours or theirs}.mean", _same, _same)
    variance = _row(f"{theirs}.running_var", f"{ours or theirs}.var", _same, _same)
    count = {f"{theirs}.num_batches_tracked": np.zeros((), np.int64)}
    yield dataclasses.replace(variance, constants=count)


def custom(
    theirs: Names,
    ours: Names,
    to_ours: Callable[[Arrays, Sequence[int]], Arrays],
    to_theirs: Callable[[Arrays], Arrays],
) -> Iterator[Row]:
    """Arrays by functions of one's own; see `Row`. A ValueError raised in `to_ours` becomes a line of the report."""
    yield Row(_names(theirs), _names(ours), to_ours, to_theirs)


def constant(theirs: str, value: np.ndarray) -> Iterator[Row]:
    """An entry of theirs without a counterpart here (a buffer): passed over when read, written as `value`."""
    yield Row((), (), lambda arrays, sizes: [], lambda arrays: [], {theirs: value})


def _module(theirs, ours, leaves, forward, backward):
    ours = theirs if ours is None else ours
    for their_leaf, our_leaf in leaves.items():
        yield _row(
            [f"{name}.{their_leaf}" for name in _names(theirs)],
            [f"{name}.{our_leaf}" for name in _names(ours)],
            forward,
            backward,
        )


def _row(theirs: Names, ours: Names, forward: Callable, backward: Callable) -> Row:
    theirs, ours = _names(theirs), _names(ours)
    if len(theirs) > 1 and len(ours) > 1:
        raise ValueError(f"weight table: {', '.join(theirs)}: several to several needs a custom row")

    def to_ours(arrays: Arrays, sizes: Sequence[int]) -> Arrays:
        whole = _joined([forward(array) for array in arrays])
        if len(ours) == 1:
            return [whole]
        if whole.shape[-1:] != (sum(sizes),):
            raise ValueError(f"shape {whole.shape} cannot be cut into {' + '.join(map(str, sizes))}")
        return np.split(whole, np.cumsum(sizes)[:-1], axis=-1)

    def to_theirs(arrays: Arrays) -> Arrays:
        whole = _joined(arrays)
        return [backward(part) for part in (np.split(whole, len(theirs), axis=-1) if len(theirs) > 1 else [whole])]

    return Row(theirs, ours, to_ours, to_theirs)


def _names(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _joined(arrays: Arrays) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _channels_last(array: np.ndarray) -> np.ndarray:
    if array.ndim < 3:
        raise ValueError(f"shape {array.shape} is not a convolution's")
    return np.moveaxis(array, (0, 1), (-1, -2))


def _channels_first(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, (-1, -2), (0, 1))


def _without_places(array: np.ndarray) -> np.ndarray:
    if array.shape[2:] != (1, 1):
        raise ValueError(f"shape {array.shape} is not that of a pointwise convolution")
    return array[:, :, 0, 0].T


def _with_places(array: np.ndarray) -> np.ndarray:
    return array.T[:, :, None, None]


# --- the table --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Step:
    """A row for given numbers."""

    row: Row
    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    constants: Mapping[str, np.ndarray]


@dataclasses.dataclass
class Reading:
    """What a file had for a model.

    Attributes:
      arrays: by our name, in our layout; also what only one row could mean but the model does not have.
      origin: our name -> their names.
      problems: arrays that could not be converted; one line each.
      unknown: their names that no row fits.
    """

    arrays: Flat
    origin: dict[str, tuple[str, ...]]
    problems: list[str]
    unknown: list[str]


class Table:
    """Rows, checked when the table is made.

    Raises:
      ValueError: two rows fit the same name, on either side.
    """

    def __init__(self, *groups: Iterable[Row]):
        self.rows = [row for group in groups for row in group]
        self._by_ours = _index((name, row) for row in self.rows for name in row.ours)
        self._by_theirs = _index((name, row) for row in self.rows for name in (*row.theirs, *row.constants))

    def knows(self, name: str) -> bool:
        """Whether a row has this name of theirs, for some numbers."""
        return any(True for _ in _matches(self._by_theirs, name))

    def kinds(self) -> set[str]:
        """Their names without numbers."""
        return set(self._by_theirs)

    def plan(self, names: Iterable[str]) -> list[Step]:
        """The rows that hold these parameters of ours, each name in exactly one.

        Raises:
          ValueError: a name that no row has, or whose row lacks a partner.
        """
        names = list(names)
        known = set(names)
        steps: dict[tuple[int, tuple[str, ...]], Step] = {}
        for name in names:
            for row, numbers in _matches(self._by_ours, name):
                step = _step(row, numbers)
                if not known.issuperset(step.ours):
                    lacking = ", ".join(sorted(set(step.ours) - known))
                    raise ValueError(f"weight table: {name} comes with {lacking}, which the model does not have")
                steps[id(row), numbers] = step
                break
            else:
                raise ValueError(f"weight table: {unknown_name('parameter', name, self._patterns())}")
        constants = [_step(row, ()) for row in self.rows if not row.ours]
        return [*steps.values(), *constants]

    def read(self, theirs: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]) -> Reading:
        """Their arrays by our names. `expected` are the model's names and shapes; shapes are not checked here."""
        reading = Reading({}, {}, [], [])
        used: set[str] = set()
        for step in self.plan(expected):
            used.update(step.constants)
            present = [name for name in step.theirs if name in theirs]
            reading.origin |= dict.fromkeys(step.ours, step.theirs)
            if len(present) == len(step.theirs):
                used.update(present)
                self._convert(step, theirs, [expected[name][-1:] for name in step.ours], reading)
        for name in theirs:
            if name in used:
                continue
            steps = [_step(row, numbers) for row, numbers in _matches(self._by_theirs, name)]
            simple = [s for s in steps if len(s.theirs) == len(s.ours) == 1 and s.ours[0] not in expected]
            if simple:
                reading.origin[simple[0].ours[0]] = (name,)
                self._convert(simple[0], theirs, [()], reading)
            elif not any(name in step.constants for step in steps):
                reading.unknown.append(name)
        return reading

    @staticmethod
    def _convert(step: Step, theirs: Mapping[str, np.ndarray], sizes: list[tuple[int, ...]], reading: Reading) -> None:
        try:
            lasts = [size[0] if size else 1 for size in sizes]
            arrays = step.row.to_ours([np.asarray(theirs[name]) for name in step.theirs], lasts)
        except ValueError as error:
            reading.problems.append(f"{' + '.join(step.theirs)}: {error}")
            return
        reading.arrays |= zip(step.ours, arrays, strict=True)

    def write(self, ours: Mapping[str, np.ndarray]) -> Flat:
        """Our arrays by their names.

        Raises:
          ValueError: a name that no row has, or a row whose functions are no inverses: what was written is read again
            and has to be the same, bit for bit.
        """
        theirs: Flat = {}
        for step in self.plan(ours):
            theirs |= zip(step.theirs, step.row.to_theirs([ours[name] for name in step.ours]), strict=True)
            theirs |= step.constants
        again = self.read(theirs, {name: array.shape for name, array in ours.items()}).arrays
        wrong = [name for name, array in ours.items() if not _identical(array, again.get(name))]
        if wrong:
            raise ValueError(f"weight table: the row of {wrong[0]} does not read back what it wrote")
        return theirs

    def _patterns(self) -> list[str]:
        return [name for row in self.rows for name in row.ours]


Index = dict[str, list[tuple[str, list[str], Row]]]
"""Rows by the kind of a name of theirs: that name and its numbers, `{}` or digits."""


def _index(entries: Iterable[tuple[str, Row]]) -> Index:
    index: Index = defaultdict(list)
    for name, row in entries:
        alike, numbers = index[kind_of(name)], _NUMBER.findall(name)
        for other, others, _ in alike:
            if all(a == b or "{}" in (a, b) for a, b in zip(numbers, others, strict=True)):
                raise ValueError(f"weight table: ambiguous: {name} and {other} fit the same name")
        alike.append((name, numbers, row))
    return index


def kind_of(name: str) -> str:
    """The name without its numbers: what two patterns that fit the same name have in common."""
    return _NUMBER.sub("#", name)


def _matches(index: Index, name: str) -> Iterator[tuple[Row, tuple[str, ...]]]:
    numbers = _NUMBER.findall(name)
    if "{}" in numbers:
        return
    for _, wanted, row in index.get(kind_of(name), ()):
        if all(a in ("{}", b) for a, b in zip(wanted, numbers, strict=True)):
            yield row, tuple(b for a, b in zip(wanted, numbers, strict=True) if a == "{}")


def _step(row: Row, numbers: tuple[str, ...]) -> Step:
    theirs, ours = (tuple(name.format(*numbers) for name in names) for names in (row.theirs, row.ours))
    return Step(row, theirs, ours, {name.format(*numbers): value for name, value in row.constants.items()})


def _identical(array: np.ndarray, other: np.ndarray | None) -> bool:
    return (
        other is not None
        and array.dtype == other.dtype
        and array.shape == other.shape
        and (array.tobytes() == other.tobytes())
    )
