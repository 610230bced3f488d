"""Reference implementations: how official constructor arguments, inputs and values read here.

Each folder of `tests/families/` has a `reference.py` with `REFERENCES`, and `operator_references.py` those of operators
alone; all are found here. A model is built from the `config` of a reference file, so any configuration of a family can
be compared (`tests/golden/test_golden.py`).
"""

import dataclasses
import fnmatch
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from official_config import Config

from models.weights.family import FAMILIES, Family, register_family

Values = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Reference:
    """An official implementation of a family, of a module alone, or of an operator.

    Attributes:
      name: that of the family, where it is one of `models` and `of` does not say it.
      options: official constructor arguments to keyword arguments of `model`. Keys in `official_config.NOTES` and those
        that start with `_` are descriptions; any other key without a counterpart is a ValueError.
      golden: patterns of the names of reference files.
      evaluate: `(model, inputs, config, stages) -> values`: everything a reference file holds, by the names in it
        (`"y"` and so on), and the outputs of the official modules `stages`, by module path. Inputs and values are in
        the official layout, so a gradient with respect to an input comes back in that layout by itself.
      inputs: patterns of the names of their inputs.
      module: of a module alone, its class and table of weights, which then is a family of its own.
      stacked: the model takes `scan`.
      of: the family, where it has another name: one of several projects that have models of it.
      sized: the model is made for a size of images, of which its official class knows nothing: that of `x`.
    """

    name: str
    options: Callable[[Config], dict[str, Any]]
    golden: tuple[str, ...]
    evaluate: Callable[[Any, Values, Config, Sequence[str]], Values]
    inputs: tuple[str, ...] = ("x",)
    module: tuple[type[nnx.Module], Callable[[Any], Any]] | None = None
    stacked: bool = False
    sized: bool = False
    of: str = ""

    @property
    def family(self) -> Family | None:
        """What `models` knows of it; None for an operator."""
        return FAMILIES.get(self.of or self.name)

    def build(self, config: Config, **overrides: Any) -> nnx.Module | None:
        """Our model for official constructor arguments, abstract (its leaves are shapes); None for an operator."""
        options = self.options(config) | overrides
        if (family := self.family) is None:
            return None
        if self.module is not None:
            return nnx.eval_shape(lambda: family.model(**options, rngs=nnx.Rngs(0)))
        made = family.model.Options(**options)  # type: ignore[attr-defined]
        return nnx.eval_shape(lambda: family.model(made, rngs=nnx.Rngs(0)))


def _found() -> dict[str, Reference]:
    here = Path(__file__).resolve().parent
    folders = sorted(file.parent.name for file in here.glob("families/*/reference.py"))
    found: dict[str, Reference] = {}
    for module in ("operator_references", *(f"families.{folder}.reference" for folder in folders)):
        for reference in importlib.import_module(module).REFERENCES:
            if reference.name in found:
                raise ValueError(f"reference {reference.name!r} is there twice")
            found[reference.name] = reference
            if reference.module is not None:
                kind, table = reference.module
                register_family(Family(reference.name, kind, layouts={"torch": table}))
    return found


def reference_of(stem: str) -> Reference | None:
    """The reference that a file is of, by its name without ending; None if there is none yet."""
    for reference in REFERENCES.values():
        if any(fnmatch.fnmatchcase(stem, pattern) for pattern in reference.golden):
            return reference
    return None


REFERENCES: dict[str, Reference] = {}
REFERENCES.update(_found())
