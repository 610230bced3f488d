"""Experiment configurations: `base.py` declares every key, each other file is one experiment.

`load("configs/quickstart.py", {"optim.learning_rate": "3e-4"})` gives a checked, immutable `Config`.
"""

from configs.duration import Duration
from configs.load import describe, differences, from_dict, keys, load, replace, split_arguments, unread
from configs.schema import READS, Config, Field, as_dict, build, digest, flat_values, nearest
from configs.shipped import names
from configs.size import SIZE_KEY, Size, pair, transforms

__all__ = [
    "READS",
    "SIZE_KEY",
    "Config",
    "Duration",
    "Field",
    "Size",
    "as_dict",
    "build",
    "describe",
    "differences",
    "digest",
    "flat_values",
    "from_dict",
    "keys",
    "load",
    "names",
    "nearest",
    "pair",
    "replace",
    "split_arguments",
    "transforms",
    "unread",
]
