"""Models by name: a table of variants per model class."""

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from models.names import keyword_options, unknown_name

_VARIANTS: dict[str, tuple[Callable[..., nnx.Module], dict[str, Any]]] = {}


def register(build: Callable[..., nnx.Module], variants: Mapping[str, Mapping[str, Any]]) -> None:
    """Make `variants` (name -> keyword arguments of `build`) known to `create`. ValueError for a name that is taken."""
    for name, arguments in variants.items():
        if name in _VARIANTS:
            raise ValueError(f"model name {name!r} is already registered")
        _VARIANTS[name] = (build, dict(arguments))


def names(pattern: str = "*") -> list[str]:
    """Registered names that match a shell pattern, sorted: `names("vit_*16")`."""
    return sorted(name for name in _VARIANTS if fnmatch.fnmatchcase(name, pattern))


def variant(name: str) -> dict[str, Any]:
    """Keyword arguments behind a name, as a copy. ValueError listing the nearest names if there is none."""
    return dict(_lookup(name)[1])


def create(
    name: str,
    *,
    rngs: nnx.Rngs,
    num_classes: int = 1000,
    image_size: int | tuple[int, int] | None = None,
    dtype: Any = None,
    **overrides: Any,
) -> nnx.Module:
    """The named model with fresh parameters.

    Args:
      image_size: in pixels, one side or (height, width); None for the variant's own.
      dtype: of the computation; parameters are float32.
      overrides: any other option of the model class.

    ValueError, listing the nearest, for an unknown name or option. Under `nnx.eval_shape` nothing is allocated.
    """
    build, arguments = _lookup(name)
    allowed = keyword_options(build)
    for option in overrides:
        if option not in allowed:
            raise ValueError(unknown_name(f"option of model {name!r}", option, allowed))
    if image_size is not None:
        overrides["image_size"] = image_size
    return build(**{**arguments, "num_classes": num_classes, "dtype": dtype, **overrides}, rngs=rngs)


def _lookup(name: str) -> tuple[Callable[..., nnx.Module], dict[str, Any]]:
    if name not in _VARIANTS:
        raise ValueError(unknown_name("model", name, names()))
    return _VARIANTS[name]
