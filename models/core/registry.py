"""Models by name: a table of variants for each class of models."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

import naming
from models.core.aliases import meaning, nearest
from models.core.errors import unknown_name
from models.core.state import merge, split

_VARIANTS: dict[str, tuple[type[nnx.Module], dict[str, Any]]] = {}


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """How `create` made a model. It is part of no computation, so models that differ in nothing else are equal."""

    model: type[nnx.Module]
    options: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin)

    def __hash__(self) -> int:
        return hash(Origin)


def register(model: Any, variants: Mapping[str, Mapping[str, Any]]) -> None:
    """Makes variants known to `create`.

    Args:
      model: a class with `Options`, a dataclass, that is made as `model(options, rngs=...)`.
      variants: name -> what is said to `Options`.

    Raises:
      ValueError: a name is taken, or the class is no such class.
    """
    if variants and not dataclasses.is_dataclass(getattr(model, "Options", None)):
        raise ValueError(
            f"{getattr(model, '__name__', model)} has no Options: a dataclass that says what it is made of"
        )
    for name, arguments in variants.items():
        if name in _VARIANTS:
            raise ValueError(f"model name {name!r} is already registered")
        _VARIANTS[name] = (model, dict(arguments))


def names(pattern: str = "*") -> list[str]:
    """Registered names that match a shell pattern, sorted: `names("vit_*16")`."""
    return sorted(name for name in _VARIANTS if fnmatch.fnmatchcase(name, pattern))


def variant(name: str) -> dict[str, Any]:
    """Options behind a name, ours or another project's, as a copy. ValueError listing the nearest if there is none."""
    return dict(_lookup(name)[1])


def options_of_model(name: str) -> dict[str, Any]:
    """All options of a variant with their values. ValueError as for `variant`."""
    model, arguments = _lookup(name)
    defaults = {field.name: field.default for field in dataclasses.fields(model.Options)}  # type: ignore[attr-defined]
    return defaults | arguments


def image_size(name: str) -> Any:
    """Side in pixels, or (height, width), that a variant is made for. ValueError as for `variant`, and for a model that
    takes no images.
    """
    options = options_of_model(name)
    if "image_size" not in options:
        raise ValueError(f"model {name!r} has no image_size")
    return options["image_size"]


def create(name: str, *, rngs: nnx.Rngs, **options: Any) -> Any:
    """The named model with fresh parameters.

    Args:
      name: of a variant; one that timm, Hugging Face or torchvision have for it (docs/models.md); or
        `package.module:Class` for a class of the user's with `Options`, a dataclass, that is made as
        `Class(options, rngs=...)`.
      options: of the class of the model, in place of what the variant says; None for `image_size` is the variant's own.

    Raises:
      ValueError: there is no such model or option (the line lists the nearest), an option has a value that it cannot
        have, or nothing in this model takes it.

    Under `nnx.eval_shape` nothing is allocated.
    """
    model, arguments = _lookup(name)
    known = options_of_model(name)
    for option in options:
        if option not in known:
            raise ValueError(unknown_name(f"option of model {name!r}", option, sorted(known)))
    given = {option: value for option, value in options.items() if not (option == "image_size" and value is None)}
    made = model.Options(**{**arguments, **given})  # type: ignore[attr-defined]
    for option, reason in getattr(made, "unused", dict)().items():
        if option in given and given[option] != known[option]:
            raise ValueError(f"{option}={given[option]!r} of model {name!r}: {reason}")
    return _made(Origin(model, made), rngs)


def reset_classifier(model: nnx.Module, num_classes: int, *, rngs: nnx.Rngs) -> Any:
    """A model for other classes: with a new classifier (every head of it), and else the same arrays as `model` has.

    Args:
      model: one that `create` or this function made; it is not changed.
      num_classes: 0 for no classifier; the model then returns pooled features.

    Raises:
      ValueError: a model made in another way: it does not say what its classifier is made of. One without classes.
    """
    origin = getattr(model, "origin", None)
    if origin is None:
        raise ValueError(f"this {type(model).__name__} was not made by models.create: make one for the classes instead")
    if not hasattr(origin.options, "num_classes"):
        raise ValueError(f"a {type(model).__name__} has no classes")

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


def _made(origin: Origin, rngs: nnx.Rngs) -> Any:
    build: Callable[..., Any] = origin.model
    model = build(origin.options, rngs=rngs)
    model.origin = origin
    return model


def _for_classes(origin: Origin, num_classes: int) -> Origin:
    return Origin(origin.model, dataclasses.replace(origin.options, num_classes=num_classes))


def _lookup(name: str) -> tuple[type[nnx.Module], dict[str, Any]]:
    if naming.is_outside(str(name)):
        model = naming.load(name, "model")
        if not dataclasses.is_dataclass(getattr(model, "Options", None)):
            raise ValueError(f"model {name!r} has no Options: a dataclass that says what it is made of")
        return model, {}
    if name in _VARIANTS:
        return _VARIANTS[name]
    meant = meaning(str(name))
    if meant is None:
        raise ValueError(unknown_name("model", str(name), names(), near=nearest(str(name), names())))
    variant, options = meant
    model, arguments = _VARIANTS[variant]
    return model, {**arguments, **options}
