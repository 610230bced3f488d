"""Frozen partners of a run, such as a teacher: trained models that take its images and answer in its classes.

A partner is a workdir, a checkpoint, or a file of official weights behind the configuration that describes its model,
`configs/vit_s16_imagenet.py:vit_s16.safetensors`, as `eval.py` takes them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

import configs
import data
import models
import tasks
from configs import Config
from data import classes
from models.core import sharding
from models.weights import files
from training.checkpoints import checkpoint, initial, inputs
from training.distributed import mesh

Arrays = dict[str, tuple[dict[str, Any], dict[str, Any]]]

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


def spread(
    helpers: Mapping[str, nnx.Module], device_mesh: Mesh, *, shapes_only: bool = False
) -> tuple[dict[str, models.Graph], Arrays, Any]:
    """What a compiled step takes of partners, spread over the mesh by the rules of their models.

    Args:
      helpers: by name, with their numbers.
      shapes_only: nothing is put on the devices, which may be described ones.

    Returns:
      Their static parts, `{name: (parameters, state)}`, and where these lie.

    Raises:
      ValueError: the devices do not divide what a partner consists of; names it.
    """
    graphs, arrays, shardings = dict[str, models.Graph](), Arrays(), dict[str, Any]()
    for name, helper in helpers.items():
        graphs[name], *leaves = models.split(helper)
        arrays[name] = (leaves[0], leaves[1])
        try:
            shardings[name] = mesh.tree_shardings(arrays[name], sharding.rules(helper), device_mesh)
        except ValueError as error:
            raise ValueError(f"partner {name!r}: {error}") from error
    placed = jax.eval_shape(lambda: arrays) if shapes_only else mesh.place(arrays, shardings)
    return graphs, placed, shardings


def loader(config: Config, info: data.Info) -> Callable[..., nnx.Module]:
    """`load(path, match_classes=True)` for `Task.partners` of a run with this configuration and data."""
    return functools.partial(load, config, info)


def load(config: Config, info: data.Info, path: str, match_classes: bool = True) -> nnx.Module:
    """The trained model of a partner, in the terms of a run. What had to be changed is said on stderr.

    Args:
      config, info: of the run.
      path: workdir, checkpoint, or `CONFIG.py:FILE` for a file of official weights.
      match_classes: whether its logits are for the classes of the run, by name; otherwise they stay as they are.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: it is another model than its configuration says, or cannot be brought to the terms of the run.
    """
    model, theirs, their_info = _trained(path, info)
    try:
        terms, notes = _terms(config, theirs, info if match_classes else None, their_info)
    except ValueError as error:
        raise ValueError(f"partner {path}: {error}") from error
    initial.say(f"partner {path}", notes)
    return model if terms == Terms() else Partner(model, terms)


def _trained(path: str, info: data.Info) -> tuple[nnx.Module, Config, data.Info]:
    described, _, file = path.rpartition(":")
    if not described and files.is_weight_file(path):
        raise ValueError(f"{path}: a file of weights does not say its model; write configs/FILE.py:{path}")
    if described and files.is_weight_file(file):
        config = configs.load(described)
        saved = initial.read_official(file, config, info, average=True)
    else:
        saved = checkpoint.restore_for_eval(path)
        config = configs.from_dict(saved["config"])
    their_info = initial.saved_info(saved)
    _, graph, *templates = initial.abstract_model(tasks.create(config, their_info))
    parts = zip(initial.weights(saved), templates, strict=True)
    return models.merge(graph, *(initial.fit(loaded, like, path) for loaded, like in parts)), config, their_info


def _terms(ours: Config, theirs: Config, info: data.Info | None, their_info: data.Info) -> tuple[Terms, list[str]]:
    terms, notes = Terms(), list[str]()
    before, after = inputs.sides(ours), inputs.sides(theirs)
    if before != after:
        terms = dataclasses.replace(terms, size=after)
        notes.append(f"images are resized from {_by(before)} to {_by(after)} pixels for it")
    scales = inputs.scale(ours, "train_transforms"), inputs.scale(theirs, "eval_transforms")
    if scales[0] is not None and scales[1] is not None:
        if (scale := inputs.rescaled(scales[0], scales[1])) is not None:
            terms = dataclasses.replace(terms, scale=scale)
            notes.append(f"images are brought to its {inputs.spelled(scales[1])}")
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
