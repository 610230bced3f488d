"""Our variants as timm's PyTorch models (extra `bench`): what they are called there, and how one is made."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

from models.core.aliases import Meaning, names_of
from models.core.registry import image_size

ALIKE = {"image_size", "activation", "num_classes"}
"""Options that change nothing of a model but its positions, its classifier and a function."""


def timm_name(variant: str) -> str | None:
    """What timm calls the model of a variant, perhaps for images of another size; None where it has none."""
    side = image_size(variant)

    def unlike(one: Meaning) -> tuple[Any, ...]:
        # Names that timm no longer uses have no tags.
        return not one.tags, abs(one.options.get("image_size", side) - side), len(one.options), one.name

    found = [one for one in names_of(variant) if one.source == "timm" and one.options.keys() <= ALIKE]
    return min(found, key=unlike).name if found else None


def create(name: str, **options: Any) -> Any:
    """timm's model of that name, whether or not torchvision is there."""
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.insert(0, _NoTorchvision())
    import timm

    return timm.create_model(name, **options)


def size_options(name: str, side: int) -> dict[str, int]:
    """What `create` has to be told so that timm's model takes square images of `side` pixels."""
    import timm

    own = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return {} if own is None or own.input_size[1] == side else {"img_size": side}


class _NoTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for torchvision, which has no CPU build everywhere and which these models do not use."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None
        )

    def create_module(self, spec: Any) -> types.ModuleType:
        class Anything(types.ModuleType):
            def __getattr__(self, name: str) -> Any:
                if name.startswith("__"):
                    raise AttributeError(name)
                modes = {"NEAREST": 0, "LANCZOS": 1, "BILINEAR": 2, "BICUBIC": 3, "BOX": 4, "HAMMING": 5}
                return type(name, (), {"__getattr__": lambda _, __: None, **modes})

        return Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []
