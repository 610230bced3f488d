"""Classifiers of other runs and of files of weights: for which classes they are, and in whose order."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

import data
from data import classes
from models.weights.adapt import CLASSIFIERS
from models.weights.files import Weights
from models.weights.load import classifier_classes


def of_file(found: Weights, model: nnx.Module, info: data.Info) -> data.Info:
    """`info` with the classes that a file of weights was trained on, as far as that is known.

    A file that `eval.py --export` wrote says them. One with a classifier for 1000 classes is ImageNet's where those of
    `info` are; others count as those of `info`.

    Args:
      model: one that the file is for, with any number of classes.
    """
    if found.class_names:
        return dataclasses.replace(info, num_classes=len(found.class_names), class_names=found.class_names)
    synsets = classes.imagenet()
    if classifier_classes(model, found) == len(synsets) and classes.imagenet_places(info.class_names):
        return dataclasses.replace(info, num_classes=len(synsets), class_names=synsets)
    return info


def in_order(
    loaded: Mapping[str, np.ndarray], fresh: Mapping[str, Any], theirs: data.Info, ours: data.Info
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Parameters whose classifier, for as many classes, is in the order of ours; for other classes it takes its `fresh`
    values. What was done is said in sentences.
    """
    count = ours.num_classes
    heads = [
        name
        for name, array in loaded.items()
        if name.split(".")[0] in CLASSIFIERS and array.ndim and array.shape[-1] == count
    ]
    if not count or theirs.num_classes != count:
        return dict(loaded), []
    try:
        found = classes.places(ours, theirs, "the weights")
    except ValueError as error:
        if not heads:
            return dict(loaded), [
                f"{error}; no classifier is known by its name ({', '.join(CLASSIFIERS)}) to start anew"
            ]
        anew = {name: np.asarray(fresh[name]) for name in heads if name in fresh}
        return {**loaded, **anew}, [f"the classifier starts anew: {error}"]
    if not (said := classes.described(found, count)):
        return dict(loaded), []
    if not heads:
        return dict(loaded), [f"{said}; no classifier is known by its name ({', '.join(CLASSIFIERS)}) to put in order"]
    return {**loaded, **{name: loaded[name][..., list(found)] for name in heads}}, [f"the classifier is for {said}"]
