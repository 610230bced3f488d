"""What Hugging Face's `config.json` says of a model, as options of ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

Config = Mapping[str, Any]

_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "swish": "silu"}


@dataclasses.dataclass(frozen=True)
class Keys:
    """How a kind of `config.json` reads.

    Attributes:
      defaults: of the library, for keys that a file leaves out.
      renamed: its keys -> our options.
      options: `config with defaults -> options` that are not renamed alone.
    """

    defaults: Config
    renamed: Mapping[str, str]
    options: Callable[[Config], Mapping[str, Any]] = lambda config: {}

    def read(self, config: Config) -> dict[str, Any]:
        """Our options for a config.

        Raises:
          ValueError: it says something that we do not have.
        """
        full = {**self.defaults, **{key: value for key, value in config.items() if value is not None}}
        options = {ours: _plain(full[theirs]) for theirs, ours in self.renamed.items() if theirs in full}
        if "activation" in options:
            options["activation"] = _ACTIVATIONS.get(options["activation"], options["activation"])
        return {**options, **self.options(full)}


def classes(config: Config) -> int:
    """The number of classes of an image classifier; 0 for another architecture."""
    if not any("ForImageClassification" in str(name) for name in config.get("architectures") or ()):
        return 0
    return int(config.get("num_labels") or len(config.get("id2label") or (0, 1)))


def _plain(value: Any) -> Any:
    return tuple(_plain(one) for one in value) if isinstance(value, list | tuple) else value
