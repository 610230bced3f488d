"""Constructor arguments of official classes as a reference file writes them down."""

import json
from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]

NOTES = ("cls", "note", "notes", "input", "layout", "op", "patched", "tokens")
"""Keys of a reference file's config that describe it and are no constructor arguments."""


def arguments(config: Config, defaults: Config = {}) -> dict[str, Any]:  # noqa: B006
    """The constructor arguments in a config: descriptions taken out, defaults filled in."""
    given = {key: value for key, value in config.items() if not key.startswith("_") and key not in NOTES}
    return dict(defaults) | given


def huggingface_options(configs: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Our options for the `config.json` that the library of a reference file's time wrote for it.

    Args:
      configs: those of a family, by `model_type`.
    """
    written = json.loads(config["_hf_config_json"])
    return configs[written["model_type"]].read(written)


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
