"""What data and weights mean to a task, where two runs may differ: which class a label is, how pixels are scaled, how
large images are.

`training/` asks here and knows neither classes nor images. A task whose data mean something else overrides these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

import configs
import data
import models
from configs import Config
from data import classes
from models.weights.files import Weights
from tasks import classifiers, partner, pixel_scale, preprocessing

Arrays = dict[str, np.ndarray]


class Terms:
    """The part of a task that brings sets, weights and models of elsewhere to the terms of its run.

    Attributes:
      config: the whole configuration.
      info: what the data source says of itself.
    """

    config: Any
    info: Any

    # Data -------------------------------------------------------------------------------------------------------------

    def matched(self, source: data.Source) -> data.Source:
        """A set with the labels of the model: matched by name, where both have names. It may have fewer classes.

        Raises:
          ValueError: it has a class that the model lacks or, without names, another number of them.
        """
        return classes.labelled_as(source, self.info)

    def mismatch(self, source: data.Source) -> str:
        """What to know of a set whose labels are not simply the model's; empty where they are. Raises as `matched`."""
        return classes.described(classes.places(source.info, self.info), self.info.num_classes or 0)

    def noted(self) -> dict[str, Any]:
        """What a run notes of its data when it begins, for `check_same_data` later; JSON keeps it."""
        return {"num_classes": self.info.num_classes, "class_names": list(self.info.class_names)}

    def check_same_data(self, before: Mapping[str, Any], where: str) -> None:
        """Refuses training data (`self.info`) that are not those of the run that goes on with them.

        Args:
          before: what the run (`noted`) or a checkpoint (the fields of its `Info`) noted of its data.
          where: whose notes they are, for the message.

        Raises:
          ValueError: a label means another class than it did.
        """
        classes.check_same(before, self.info, where)

    # Weights ----------------------------------------------------------------------------------------------------------

    def info_of_file(self, found: Weights, model: nnx.Module) -> data.Info:
        """`self.info` with what is known of the data that a file of weights was trained on, such as its classes.

        Args:
          model: one that the file is for, with any number of classes.
        """
        return classifiers.of_file(found, model, self.info)

    def adapted(
        self, model: nnx.Module, loaded: Mapping[str, np.ndarray], fresh: Mapping[str, Any], theirs: Config
    ) -> tuple[Arrays, list[str]]:
        """Parameters of a run with the configuration `theirs`, fitted to the model of this one (`models.adapt`), and
        one sentence for each change.

        Args:
          model: this run's or the part of it that the parameters are for.
          loaded, fresh: parameters by unrolled name: theirs, and the model's own.

        Raises:
          ValueError: something has to be adapted and cannot be.
        """
        return models.adapt(model, loaded, fresh, image_size=pixel_scale.sides(theirs))

    def starting(
        self, loaded: Mapping[str, np.ndarray], fresh: Mapping[str, Any], theirs: data.Info
    ) -> tuple[Arrays, list[str]]:
        """Fitted parameters that mean here what they meant there: a classifier in the order of our classes; one for
        other classes takes its `fresh` values.

        Args:
          theirs: what is known of the data that they were trained on.
        """
        return classifiers.in_order(loaded, fresh, theirs, self.info)

    def other_inputs(self, theirs: Config) -> list[str]:
        """What to know of a start from a run whose inputs looked otherwise."""
        scales = [pixel_scale.scale(config, "train_transforms") for config in (theirs, self.config)]
        if scales[0] is None or scales[1] is None or pixel_scale.rescaled(scales[0], scales[1]) is None:
            return []
        before, now = map(pixel_scale.spelled, (scales[0], scales[1]))
        return [f"it was trained on images with {before}; here they have {now}"]

    def partner(
        self, model: nnx.Module, theirs: Config, their_info: data.Info, *, match_classes: bool = True
    ) -> tuple[nnx.Module, list[str]]:
        """A frozen model of another run, called with the inputs of this one, and one sentence for each change.

        Args:
          match_classes: whether its logits are for the classes of this run, by name; otherwise they stay as they are.

        Raises:
          ValueError: it cannot be brought to the terms of this run.
        """
        terms, notes = partner.between(self.config, theirs, self.info if match_classes else None, their_info)
        return (model if terms == partner.Terms() else partner.Partner(model, terms)), notes

    # What an export says of them --------------------------------------------------------------------------------------

    def described_input(self, name: str) -> dict[str, Any]:
        """What whoever calls an exported function has to know of an input, besides its shape and type."""
        if name != "image":
            return {}
        return {
            "axes": "batch, height, width, channels",
            "transforms": configs.transforms(self.config, "eval_transforms"),
            "mean": list(self.config.data.mean),
            "std": list(self.config.data.std),
        }

    def kept_with_weights(self) -> dict[str, Any]:
        """What a file of weights says of itself, as `models.export_weights` takes it."""
        kept: dict[str, Any] = {"class_names": self.info.class_names}
        if self.info.kinds.get("image") == "image":
            kept["preprocessing"] = preprocessing.of_config(self.config)
        return kept

    def described_answer(self) -> dict[str, Any]:
        """The same of the answer."""
        return {"num_classes": self.info.num_classes, "class_names": list(self.info.class_names)}
