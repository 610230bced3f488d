"""Models by name: a table of variants per model class."""

import dataclasses
import fnmatch
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from models.core.errors import keyword_options, unknown_name
from models.core.state import merge, split

_VARIANTS: dict[str, tuple[Callable[..., nnx.Module], dict[str, Any]]] = {}


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """How `create` made a model. It is part of no computation, so models that differ in nothing else are equal."""

    build: Callable[..., nnx.Module]
    arguments: Mapping[str, Any]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin)

    def __hash__(self) -> int:
        return hash(Origin)


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


def image_size(name: str) -> int:
    """Side in pixels of the images that a variant is made for. ValueError as for `variant`."""
    build, arguments = _lookup(name)
    # The signature of an NNX class is that of its metaclass.
    default = inspect.signature(inspect.getattr_static(build, "__init__")).parameters["image_size"].default
    return arguments.get("image_size", default)


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
    return _made(Origin(build, {**arguments, "num_classes": num_classes, "dtype": dtype, **overrides}), rngs)


def reset_classifier(model: nnx.Module, num_classes: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """A model for other classes: with a new classifier (every head of it), and else the same arrays as `model` has.

    Args:
      model: one that `create` or this function made; it is not changed.
      num_classes: 0 for no classifier; the model then returns pooled features.

    ValueError for a model made in another way: it does not say what its classifier is made of.
    """
    origin = getattr(model, "origin", None)
    if origin is None:
        raise ValueError(f"this {type(model).__name__} was not made by models.create: make one for the classes instead")

    def shapes(classes: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        return split(nnx.eval_shape(lambda: _made(_for_classes(origin, classes), nnx.Rngs(0))))

    graph, params, state = shapes(num_classes)
    _, own_params, own_state = split(model)
    # The classifier is what depends on the number of classes, and what a model without any lacks.
    other = shapes(num_classes + 1)[1] if num_classes else params
    new = [name for name, value in params.items() if name not in own_params or value.shape != other[name].shape]

    @jax.jit
    def fresh(rngs: nnx.Rngs) -> list[jax.Array]:
        made = split(_made(_for_classes(origin, num_classes), rngs))[1]
        return [made[name] for name in new]  # nothing else is computed

    classifier = dict(zip(new, fresh(rngs), strict=True)) if new else {}
    own = {name: own_params[name] for name in params if name not in classifier}
    return merge(graph, {**own, **classifier}, {name: own_state[name] for name in state})


def _made(origin: Origin, rngs: nnx.Rngs) -> nnx.Module:
    model = origin.build(**origin.arguments, rngs=rngs)
    model.origin = origin  # type: ignore[attr-defined]
    return model


def _for_classes(origin: Origin, num_classes: int) -> Origin:
    return Origin(origin.build, {**origin.arguments, "num_classes": num_classes})


def _lookup(name: str) -> tuple[Callable[..., nnx.Module], dict[str, Any]]:
    if name not in _VARIANTS:
        raise ValueError(unknown_name("model", name, names()))
    return _VARIANTS[name]
