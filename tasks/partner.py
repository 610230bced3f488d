"""A frozen model of another run, such as a teacher, in the terms of a run: its own images, answers in our classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

import data
from configs import Config
from data import classes
from tasks import pixel_scale

LOGITS = ("logits", "token_logits", "distillation_logits")
"""What of a model's answers has classes on its last axis."""


@dataclasses.dataclass(frozen=True)
class Terms:
    """What is done to images and logits; None leaves them.

    Attributes:
      size: (height, width) that images are resized to (bilinear, antialiased).
      scale: factor and shift of each channel.
      classes: for each class of the run, its place in the partner's logits.
    """

    size: tuple[int, int] | None = None
    scale: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    classes: tuple[int, ...] | None = None


class Partner(nnx.Module):
    """A model in the terms of another run, inside the compiled step."""

    def __init__(self, model: nnx.Module, terms: Terms):
        self.model = model
        self.terms = terms

    def __call__(self, images: Float[Array, "B Y X c"], **arguments: Any) -> Any:
        """The model's answer to images of the run."""
        answer: Any = self.model(self._theirs(images), **arguments)  # type: ignore[operator]
        return self._ours(answer) if isinstance(answer, Mapping) else self._ours({"logits": answer})["logits"]

    def features(self, images: Float[Array, "B Y X c"], **arguments: Any) -> dict[str, Any]:
        """The model's features of images of the run."""
        return self._ours(self.model.features(self._theirs(images), **arguments))  # type: ignore[attr-defined]

    def _theirs(self, images: Any) -> Any:
        if self.terms.size is not None:
            batch, _, _, channels = images.shape
            images = jax.image.resize(images, (batch, *self.terms.size, channels), "bilinear")
        if self.terms.scale is not None:
            factor, shift = (jnp.asarray(part, images.dtype) for part in self.terms.scale)
            images = images * factor + shift
        return images

    def _ours(self, answers: Mapping[str, Any]) -> dict[str, Any]:
        if self.terms.classes is None:
            return dict(answers)
        places = jnp.asarray(self.terms.classes)
        return {name: value[..., places] if name in LOGITS else value for name, value in answers.items()}


def between(ours: Config, theirs: Config, info: data.Info | None, their_info: data.Info) -> tuple[Terms, list[str]]:
    """What a model of another run needs to stand in this one, and one sentence for each change.

    Args:
      ours, theirs: configurations.
      info, their_info: what the data say of themselves; without `info` classes stay as they are.

    Raises:
      ValueError: images or classes cannot be brought to the other terms.
    """
    terms, notes = Terms(), list[str]()
    before, after = pixel_scale.sides(ours), pixel_scale.sides(theirs)
    if before != after:
        terms = dataclasses.replace(terms, size=after)
        notes.append(f"images are resized from {_by(before)} to {_by(after)} pixels for it")
    scales = pixel_scale.scale(ours, "train_transforms"), pixel_scale.scale(theirs, "eval_transforms")
    if scales[0] is not None and scales[1] is not None:
        if (scale := pixel_scale.rescaled(scales[0], scales[1])) is not None:
            terms = dataclasses.replace(terms, scale=scale)
            notes.append(f"images are brought to its {pixel_scale.spelled(scales[1])}")
    elif scales[0] is not None or scales[1] is not None:
        which = "its config.data.eval_transforms" if scales[1] is None else "config.data.train_transforms of this run"
        raise ValueError(f"images cannot be brought to its values: {which} has not one 'normalize' or 'value_range'")
    if info is not None and info.num_classes and their_info.num_classes:
        found = classes.places(info, their_info, "the partner")
        if said := classes.described(found, their_info.num_classes):
            terms = dataclasses.replace(terms, classes=found)
            notes.append(said)
    return terms, notes


def _by(sides: tuple[int, int]) -> str:
    return f"{sides[0]} x {sides[1]}"
