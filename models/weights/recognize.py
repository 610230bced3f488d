"""What a file of weights looks like: the family whose names it has, and the variants whose shapes.

Tables of names depend on a model, so families are asked through variants of theirs, made as shapes only: the shallowest
of each family first; then one of each kind of variant (another stem, a distillation token) of those that know the words
of the names, unless one knows all names. Seconds pass the first time.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from models.core.registry import create
from models.core.state import split, unrolled
from models.weights.adapt import CLASSIFIERS
from models.weights.family import FAMILIES, Family, family_of
from models.weights.table import Flat, Table, kind_of

_RESAMPLED = ("pos_embed", "relative_bias")
_NEW = (*CLASSIFIERS, "pre_logits")


@dataclasses.dataclass(frozen=True)
class Likeness:
    """How well a family knows the names of a file, apart from their numbers.

    Attributes:
      names: whose names they are, the family's own or a dialect's.
      known: how many of `of` names.
      covered: share of the kinds of names of a model of the family that the file has.
    """

    family: Family
    names: str
    known: int
    of: int
    covered: float

    @property
    def rank(self) -> tuple[float, float]:
        return self.known / self.of, self.covered


def family_like(arrays: Mapping[str, Any], model: nnx.Module) -> Likeness | None:
    """The family that knows most names: `model`'s own if it knows nearly all; None if none knows half of them."""
    stubs = _stubs(arrays)
    best = _likeness(stubs, family_of(model), model)
    if best is not None and best.known >= 0.95 * best.of:
        return best
    for rest in (False, True):
        for family in FAMILIES.values():
            if best is not None and best.known == best.of:
                return best
            kinds = _kinds(family)
            if rest and not (kinds[1:] and _akin(stubs, family, kinds[0])):
                continue
            for variant in kinds[1:] if rest else kinds[:1]:
                found = _likeness(stubs, family, abstract(variant), variant)
                if found is not None and (best is None or found.rank > best.rank):
                    best = found
    return best if best is not None and 2 * best.known > best.of else None


def variants_like(arrays: Mapping[str, Any], family: Family) -> list[str]:
    """Variants of a family that have exactly these arrays, apart from classifiers and what is resampled; of several,
    those that agree in the latter too.
    """
    stubs = _stubs(arrays)
    sizes = {size for array in stubs.values() for size in array.shape}
    alike: dict[str, bool] = {}
    for name, options in family.variants.items():
        # Making a model takes a tenth of a second or more, and most have other widths.
        if sizes.issuperset(_numbers(options, "width", "widths")):
            exact = _has_shapes(stubs, family, name)
            alike |= {} if exact is None else {name: exact}
    return [name for name, exact in alike.items() if exact] or list(alike)


@functools.lru_cache(maxsize=64)
def abstract(variant: str) -> nnx.Module:
    """A variant as shapes only."""
    return nnx.eval_shape(lambda: create(variant, rngs=nnx.Rngs(0)))


def _kinds(family: Family) -> list[str]:
    """One variant for each combination of options that are words or switches."""
    kinds: dict[Any, str] = {}
    for name, options in sorted(family.variants.items(), key=lambda item: sum(_numbers(item[1], "depth", "depths"))):
        kinds.setdefault(frozenset((k, v) for k, v in options.items() if isinstance(v, str | bool)), name)
    return list(kinds.values())


def _numbers(options: Mapping[str, Any], *names: str) -> list[int]:
    return [int(number) for name in names for number in np.ravel(options.get(name, ()))]


def _stubs(arrays: Mapping[str, Any]) -> Flat:
    """Arrays of the same shapes that take no memory."""
    return {name: np.broadcast_to(np.zeros((), array.dtype), array.shape) for name, array in arrays.items()}


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A model's table in one layout, and its shapes by layer."""

    table: Table
    shapes: dict[str, tuple[int, ...]]


def _asked(family: Family, model: nnx.Module, layout: str) -> _Asked | None:
    """None for a model that the layout does not have."""
    _, params, state = split(model)
    shapes = {name: tuple(value.shape) for name, value in unrolled({**params, **state}).items()}
    try:
        table = family.layouts[layout](model)
        table.plan(shapes)
    except (KeyError, ValueError):
        return None
    return _Asked(table, shapes)


@functools.lru_cache(maxsize=128)
def _asked_variant(family: str, variant: str, layout: str) -> _Asked | None:
    return _asked(FAMILIES[family], abstract(variant), layout)


def _likeness(stubs: Flat, family: Family, model: nnx.Module, variant: str = "") -> Likeness | None:
    found = family.translate(stubs, model)
    asked = _asked_variant(family.name, variant, found.layout) if variant else _asked(family, model, found.layout)
    if asked is None or not found.arrays:
        return None
    wanted = {kind_of(name) for step in asked.table.plan(asked.shapes) for name in step.theirs}
    have, knows = {kind_of(name) for name in found.arrays}, asked.table.kinds()
    known = sum(kind_of(name) in knows for name in found.arrays)
    names = f"names of {' and '.join(found.dialects)}" if found.dialects else "its own names"
    return Likeness(family, names, known, len(found.arrays), len(wanted & have) / len(wanted))


def _akin(stubs: Flat, family: Family, variant: str) -> bool:
    """Whether most names end (`attn.qkv.weight`, `mlp.fc1.bias`) as some of a variant's do, so that another kind of
    variant may know them all.
    """
    asked = _asked_variant(family.name, variant, "torch")
    ends = {_end(kind) for kind in asked.table.kinds()} if asked else set()
    return 2 * sum(_end(kind_of(name)) in ends for name in stubs) > len(stubs)


def _end(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _has_shapes(stubs: Flat, family: Family, variant: str) -> bool | None:
    """Whether in what is resampled too; None for a variant with other shapes."""
    found = family.translate(stubs, abstract(variant))
    asked = _asked_variant(family.name, variant, found.layout)
    if asked is None:
        return None
    reading = asked.table.read(found.arrays, asked.shapes)
    there, here = (
        {name: shape for name, shape in shapes.items() if name.partition(".")[0] not in _NEW}
        for shapes in ({name: tuple(array.shape) for name, array in reading.arrays.items()}, asked.shapes)
    )
    if reading.problems or reading.unknown or there.keys() != here.keys():
        return None
    other = [name for name, shape in here.items() if there[name] != shape]
    return not other if all(name.rpartition(".")[2] in _RESAMPLED for name in other) else None
