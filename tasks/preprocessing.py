"""What the images of an evaluation go through: as the weights say, or as the configuration does."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import configs
from configs import Config
from models.weights import stated
from models.weights.preprocessing import Preprocessing

TRANSFORMS, MEAN, STD, SIZE = "data.eval_transforms", "data.mean", "data.std", "data.image_size"


def of_config(config: Config) -> Preprocessing:
    """What the configuration says, `{size}` left as it is."""
    settings = config.data
    size = configs.pair(settings.image_size)
    return Preprocessing(size, settings.eval_transforms, tuple(settings.mean), tuple(settings.std), "the configuration")


def for_file(config: Config, file: str, given: Collection[str]) -> tuple[Config, str]:
    """The configuration with images as the weights in a file want them, and a sentence that says what they go through.

    What the file says itself, in it or beside it, comes before the configuration; what the variant of `model.name` has
    comes before the defaults of `data.eval_transforms`, `data.mean` and `data.std` only. Keys that were given on the
    command line stay, and with `eval.preprocessing=config` all do.

    Args:
      file: of weights.
      given: keys that the command line sets.

    Raises:
      ValueError: what the file says is not supported here; the line says how to do without it.
    """
    if config.eval.preprocessing == "config":
        return config, _said(config, "the configuration says")
    try:
        found = stated.of_file(file)
    except stated.NotSupported as error:
        raise ValueError(f"{error} (--config.eval.preprocessing=config takes data.eval_transforms)") from error
    changes: dict[str, Any] = {}
    if found is not None:
        who, changes[SIZE] = f"{found.source} says", found.image_size
    else:
        found = None if _chosen(config, given) else stated.of_variant(config.model.name)
        if found is None:
            return config, _said(config, "the configuration says")
        who = f"the published {config.model.name} takes them ({found.source})"
    changes |= {TRANSFORMS: found.transforms, MEAN: found.mean, STD: found.std}
    kept = [f"--config.{key}" for key in changes if key in given]
    changed = configs.replace(config, **{key.replace(".", "__"): changes[key] for key in changes if key not in given})
    return changed, _said(changed, " and ".join([who, *kept]))


def _chosen(config: Config, given: Collection[str]) -> bool:
    """Whether the file of a configuration has other transforms or statistics than it has without a word."""
    values, defaults = map(configs.flat_values, (config, configs.from_dict({})))
    return any(values[key] != defaults[key] for key in (TRANSFORMS, MEAN, STD) if key not in given)


def _said(config: Config, who: str) -> str:
    settings = config.data
    mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (settings.mean, settings.std))
    return f"images as {who}: {configs.transforms(config, 'eval_transforms')}, mean {mean}, std {std}"
