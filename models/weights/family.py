"""A family: everything that ties a kind of model to its variants, its page and its official weights.

A family declares itself as one `Family` in the `__init__.py` of its folder (`models/families/`), and is found there. A
family outside of this project is made known by `register_family`.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from flax import nnx

from models.core.aliases import Names, register_names
from models.core.errors import unknown_name
from models.core.published import Published, publish
from models.core.registry import register
from models.weights.huggingface import Keys
from models.weights.preprocessing import Preprocessing
from models.weights.table import Flat, Table


@dataclasses.dataclass(frozen=True)
class Dialect:
    """Another project's names for the weights of a family.

    Attributes:
      name: for messages.
      recognize: whether a file speaks it, by its names.
      rewrite: `(arrays, model) -> (arrays, notes)`: brings them to the names of the family's table, or those of
        another of its `layouts`; notes are sentences for the user.
      layout: the layout that the rewritten names are of.
    """

    name: str
    recognize: Callable[[Collection[str]], bool]
    rewrite: Callable[[Flat, Any], tuple[Flat, list[str]]]
    layout: str = "torch"


@dataclasses.dataclass(frozen=True)
class Translation:
    """Arrays by the names of one of a family's layouts; the dialects that a file spoke, and sentences for the user."""

    arrays: Flat
    layout: str
    dialects: list[str]
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class Family:
    """What is known of a kind of model.

    Attributes:
      name: of the family.
      model: its class.
      variants: keyword arguments of `model` by the names that `models.create` takes.
      published: what papers and repositories report of variants.
      preprocessing: what images go through, by variant.
      layouts: weight names by layout, each `model -> Table`; `"torch"` is the official PyTorch one.
      dialects: other names, tried in this order; each that recognizes a file rewrites it.
      configs: how a `config.json` of Hugging Face reads as options of `model`, by its `model_type`.
      names: what other projects call the variants (`models.core.aliases`).
    """

    name: str
    model: type[nnx.Module]
    variants: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    published: Mapping[str, Published] = dataclasses.field(default_factory=dict)
    preprocessing: Mapping[str, Preprocessing] = dataclasses.field(default_factory=dict)
    layouts: Mapping[str, Callable[[Any], Table]] = dataclasses.field(default_factory=dict)
    dialects: tuple[Dialect, ...] = ()
    configs: Mapping[str, Keys] = dataclasses.field(default_factory=dict)
    names: Names = dataclasses.field(default_factory=dict)

    def translate(self, arrays: Flat, model: Any) -> Translation:
        """Arrays of a file in the names of a layout, by each dialect that recognizes them."""
        layout, names, notes = "torch", list[str](), list[str]()
        for dialect in self.dialects:
            if dialect.recognize(arrays.keys()):
                arrays, said = dialect.rewrite(arrays, model)
                layout = dialect.layout
                names.append(dialect.name)
                notes += [f"names of {dialect.name}", *said]
        return Translation(arrays, layout, names, notes)


FAMILIES: dict[str, Family] = {}
"""Families by name."""


def register_family(family: Family) -> None:
    """Makes a family, its variants and what is published of them known. ValueError for a name that is taken."""
    if family.name in FAMILIES:
        raise ValueError(f"family {family.name!r} is already registered")
    for names in family.names.values():
        for name, entry in names.items():
            if entry["variant"] not in family.variants:
                raise ValueError(
                    unknown_name(f"variant of {family.name!r} for {name!r}", entry["variant"], family.variants)
                )
    register(family.model, family.variants)
    register_names(family.names)
    publish(family.published)
    FAMILIES[family.name] = family


def family_of(model: Any) -> Family:
    """The family of a model: that of its class, or of the nearest class that it is made from.

    Raises:
      ValueError: it has none.
    """
    by_class = {family.model: family for family in FAMILIES.values()}
    for kind in type(model).__mro__:
        if kind in by_class:
            return by_class[kind]
    known = ", ".join(kind.__name__ for kind in by_class)
    raise ValueError(f"there is no table of official weight names for {type(model).__name__}; there is for: {known}")
