"""A family: everything that ties a model, a pooling or an operator of ours to its official implementation.

One object says how official constructor arguments read here, how official weights are named, and how official inputs
and intermediate values are laid out. `models.load_weights`, `models.export_weights` and the reference tests
(`tests/golden`) all work from it, so a new family brings a table and nothing else.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from models.weight_table import Flat, Table

Config = Mapping[str, Any]
Values = dict[str, jax.Array]


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
class Family:
    """What is known of an official implementation.

    Attributes:
      name: of the family.
      model: our class; None for an operator, which has no weights.
      options: official constructor arguments to keyword arguments of `model`. Keys in `NOTES` and those that start with
        `_` are descriptions; any other key without a counterpart is a ValueError.
      layouts: weight names by layout, each `model -> Table`; `"torch"` is the official PyTorch one.
      dialects: other names, tried in this order; each that recognizes a file rewrites it.
      golden: patterns of the names of reference files.
      inputs: patterns of the names of their inputs.
      evaluate: `(model, inputs, config, stages) -> values`: everything a reference file holds, by the names in it
        (`"y"` and so on), and the outputs of the official modules `stages`, by module path. Inputs and values are in
        the official layout, so a gradient with respect to an input comes back in that layout by itself.
      stacked: the model takes `scan`.
    """

    name: str
    model: Callable[..., nnx.Module] | None
    options: Callable[[Config], dict[str, Any]]
    golden: tuple[str, ...]
    evaluate: Callable[[Any, Values, Config, Sequence[str]], Values]
    layouts: Mapping[str, Callable[[Any], Table]] = dataclasses.field(default_factory=dict)
    dialects: tuple[Dialect, ...] = ()
    inputs: tuple[str, ...] = ("x",)
    stacked: bool = False

    def build(self, config: Config, **overrides: Any) -> nnx.Module | None:
        """Our model for official constructor arguments, abstract (its leaves are shapes); None for an operator."""
        options = self.options(config) | overrides
        make = self.model
        return None if make is None else nnx.eval_shape(lambda: make(**options, rngs=nnx.Rngs(0)))


NOTES = ("cls", "note", "notes", "input", "layout", "op", "patched", "tokens")
"""Keys of a reference file's config that describe it and are no constructor arguments."""

FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Makes a family known. ValueError for a name that is taken."""
    if family.name in FAMILIES:
        raise ValueError(f"family {family.name!r} is already registered")
    FAMILIES[family.name] = family


def family_of(model: Any) -> Family:
    """The family of a model. ValueError if it has none."""
    for family in FAMILIES.values():
        if family.model is not None and type(model) is family.model:
            return family
    known = ", ".join(family.model.__name__ for family in FAMILIES.values() if family.model)
    raise ValueError(f"there is no table of official weight names for {type(model).__name__}; there is for: {known}")


def family_of_reference(stem: str) -> Family | None:
    """The family of a reference file by its name without ending; None if there is none yet."""
    for family in FAMILIES.values():
        if any(fnmatch.fnmatchcase(stem, pattern) for pattern in family.golden):
            return family
    return None


def arguments(config: Config, defaults: Config = {}) -> dict[str, Any]:  # noqa: B006
    """The constructor arguments in a config: descriptions taken out, defaults filled in."""
    given = {key: value for key, value in config.items() if not key.startswith("_") and key not in NOTES}
    return dict(defaults) | given


def named_object(value: Any) -> tuple[str, dict[str, Any]]:
    """Name and keyword arguments of a class, function or partial as a config writes it down.

    Text is a name (the part after the last dot counts); a dictionary has the class under `_type` and positional
    arguments under `_args`, and a partial its function as the first of these.

    >>> named_object({"_type": "functools.partial", "_args": ["LayerNorm"], "eps": 1e-5})
    ('LayerNorm', {'eps': 1e-05})
    """
    if not isinstance(value, Mapping):
        return str(value).rpartition(".")[2], {}
    name, _ = named_object(value.get("_type", ""))
    options = {key: entry for key, entry in value.items() if not key.startswith("_")}
    if name != "partial":
        return name, options
    if not value.get("_args"):
        raise ValueError(f"partial of nothing: {dict(value)}")
    inner, inherited = named_object(value["_args"][0])
    return inner, inherited | options
