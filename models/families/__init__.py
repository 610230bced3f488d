"""Families of published models, one folder each; each declares a `FAMILY`, or several as `FAMILIES`."""

import importlib
import pkgutil

from models.weights.family import Family, register_family


def find() -> tuple[Family, ...]:
    """What the folders here declare."""
    found: list[Family] = []
    for folder in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{folder.name}")
        found += getattr(module, "FAMILIES", None) or [module.FAMILY]
    return tuple(found)


for _family in find():
    register_family(_family)
