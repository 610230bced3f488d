"""What image classifiers are told: options that all hosts share. A host adds its own, and a family may."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from models.attention.registry import checked_options, mechanism, options_of
from models.core.errors import unknown_name
from models.core.init import scheme
from models.core.options import Count, Flag, Pair, Positive, Rate, Size, check, check_choices
from models.core.remat import REMAT
from models.layers.activation import ACTIVATIONS
from models.layers.linear import DType, computed
from models.layers.mlp import MLPS

TO_MECHANISM = {
    "qkv_bias": "qkv_bias",
    "qk_norm": "qk_norm",
    "scale_attention_norm": "scale_norm",
    "attention_dropout": "dropout",
}
"""Options of hosts that nobody but the mechanism takes, and what they are called there."""

CONTROL = "identity"
"""In the place of any mechanism: what a model is told for its own one is no error with it."""

WINDOWED = ("window", "shifted_window", "grid", "neighborhood")
"""Mechanisms whose `window` is the places along each axis that a token sees."""


def windowed(window: Any, /, **own: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Defaults of the mechanisms with windows, by their names: the window, and what is said to one by its name."""
    return {name: {"window": window, **own.get(name, {})} for name in WINDOWED}


def options_for(names: Sequence[str], options: Any) -> list[dict[str, Any]]:
    """Options of mechanisms, one dictionary for each.

    Args:
      options: None; a dictionary, of which each takes what it has; or a sequence with a dictionary (or None) for each.

    Raises:
      ValueError: none of them has an option, or there are not as many dictionaries.
    """
    if options is None or isinstance(options, Mapping):
        known = {name: options_of(name) for name in names}
        for option in options or {}:
            if not any(option in own for own in known.values()):
                kind = f"option of attention {', '.join(map(repr, known))}"
                raise ValueError(
                    unknown_name(kind, str(option), sorted({one for own in known.values() for one in own}))
                )
        return [{key: value for key, value in (options or {}).items() if key in known[name]} for name in names]
    if not isinstance(options, Sequence) or isinstance(options, str) or len(options) != len(names):
        raise ValueError(
            f"attention_options={options!r}; allowed: a dictionary, None, or one for each of {', '.join(names)}"
        )
    return [checked_options(name, own) for name, own in zip(names, options, strict=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierOptions:
    """Options of every image classifier.

    Attributes:
      image_size: side in pixels, or (height, width), that the model is made for.
      channels: of the images.
      num_classes: 0 for no head; the model then returns pooled features.
      activation: by name (`models.layers.activation`).
      attention: mechanism by name (`models.attention.registry.ATTENTION`). attention_options: its own options.
      drop_path: rate of the last layer; layer i of n has `drop_path * i / (n - 1)`.
      attention_dropout: on probabilities. head_dropout: before the head.
      scan: one leaf per parameter for all like layers of a stack, compiled once. remat: see `models.core.remat.REMAT`.
      dtype: of the computation, float32 unless given; parameters, norm statistics and softmax are float32.
    """

    image_size: Pair = 224
    channels: Count = 3
    num_classes: Size = 1000
    activation: str = "gelu"
    attention: Any = "dense"
    attention_options: Any = None
    drop_path: Rate = 0.0
    attention_dropout: Rate = 0.0
    head_dropout: Rate = 0.0
    scan: Flag = True
    remat: str = "auto"
    dtype: DType = None

    def __post_init__(self) -> None:
        check(self)
        check_choices(activation=(self.activation, ACTIVATIONS), remat=(self.remat, REMAT))
        computed(self.dtype)
        for name in self.mechanisms():
            mechanism(name)
        self.check_attention_options()

    def check_attention_options(self) -> None:
        """ValueError for `attention_options` that are none of the mechanisms'."""
        for name in self.mechanisms():
            checked_options(name, self.attention_options)

    def mechanisms(self) -> tuple[str, ...]:
        """Names of the mechanisms of the model, each once."""
        names = (self.attention,) if isinstance(self.attention, str) or self.attention is None else self.attention
        return tuple(dict.fromkeys(name for name in names if name is not None))

    def for_mechanisms(self) -> Mapping[str, tuple[str, ...]]:
        """Options that only some mechanisms have a use for: option -> names of these."""
        return {}

    def unused(self) -> dict[str, str]:
        """Options that differ from their default and that nobody takes, with the reason in words."""
        found: dict[str, str] = {}
        names = self.mechanisms()
        shown = ", ".join(names)
        for option, inside in TO_MECHANISM.items():
            known = {field.name: field.default for field in dataclasses.fields(self)}
            if option not in known or getattr(self, option) == known[option] or not names:
                continue
            if not any(inside in options_of(name) for name in names):
                found[option] = f"attention {shown} does not take it"
        for option, takers in self.for_mechanisms().items():
            if set(names) - {CONTROL} and set(takers).isdisjoint(names):
                hint = f"it is for attention {', '.join(takers)}"
                found[option] = f"{hint}; what {shown} takes goes into attention_options"
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerOptions(ClassifierOptions):
    """Options of classifiers of transformer blocks.

    Attributes:
      mlp: feed-forward layer by name (`models.layers.mlp.MLPS`).
      qkv_bias: of the projections to queries, keys and values.
      norm_eps: of layer norms.
      dropout: after attention projections and both MLP layers.
      init: scheme of initial values by name (`models.core.init`).
    """

    mlp: str = "mlp"
    qkv_bias: Flag = True
    norm_eps: Positive = 1e-5
    dropout: Rate = 0.0
    init: str = "timm"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(mlp=(self.mlp, self.mlps()))
        scheme(self.init)

    def mlps(self) -> Sequence[str]:
        """Names of the feed-forward layers that there are."""
        return tuple(MLPS)
