"""Weights that a run starts from, that are evaluated or that a frozen partner has: read from a workdir, a checkpoint or
a file of official weights, and fitted to a model.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

import configs
import data
import models
import tasks
from configs import Config
from data import classes
from models.weights import files
from models.weights.adapt import CLASSIFIERS
from models.weights.family import FAMILIES
from models.weights.files import Weights
from models.weights.load import classifier_classes, read
from models.weights.wrappings import EMA, RAW
from tasks.base import Task
from training.checkpoints import checkpoint, inputs
from training.checkpoints import checkpoint_layout as layout
from training.distributed import mesh

AUTO = "auto"
"""Value of `config.model.init_weights` that takes the averaged weights of a run where it has some, and the only ones of
a file."""


def abstract_model(task: Task) -> tuple[nnx.Module, Any, Any, Any]:
    """The task's model without numbers, and its split: graph, parameters and other state as shapes."""
    model = nnx.eval_shape(lambda: task.build_model(nnx.Rngs(0)))
    return model, *models.split(model)


def weights(saved: Mapping[str, Any], use_ema: bool = True) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Parameters and model state of a checkpoint with unrolled names, averaged ones if there are any and `use_ema`."""
    chosen = saved["ema"] if use_ema and saved["ema"] else saved
    return chosen["params"], chosen["model_state"]


def saved_info(saved: Mapping[str, Any]) -> data.Info:
    """What the data source of a saved run said about itself.

    Checkpoints from before fields had shapes have their kinds alone, and the shape of the image beside them.
    """
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in saved["metadata"]["info"].items()
    }
    shape = values.pop("image_shape", None)
    fields = {
        name: data.FieldSpec(**spec) if isinstance(spec, Mapping) else data.FieldSpec(spec)
        for name, spec in values["fields"].items()
    }
    if shape and "image" in fields:
        fields["image"] = dataclasses.replace(fields["image"], shape=shape)
    return data.Info(**{**values, "fields": fields})


def fit(loaded: Mapping[str, np.ndarray], template: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Brings arrays with unrolled names into the layout of `template`, which may be scanned.

    They are NumPy arrays where those of the template are, and JAX arrays otherwise.

    Raises:
      ValueError: names, shapes or types differ; one line with the first few.
    """
    found = {name: layout.ArrayInfo(array.shape, array.dtype.name) for name, array in loaded.items()}
    if different := layout.difference(found, layout.expected(template)):
        raise ValueError(f"{path}: the weights do not fit the model: {different}")
    return layout.fill(dict(template), loaded)


def find(path: str) -> None:
    """Refuses a place to start from that is not there.

    Raises:
      FileNotFoundError: neither a file of weights, nor a workdir or checkpoint.
    """
    if files.is_weight_file(path):
        files.check(path)
    else:
        checkpoint.find(path)


def read_official(
    path: str, config: Config, info: data.Info, which: str | None = None, *, average: bool = False
) -> dict[str, Any]:
    """A file of official weights for the model that a configuration describes, as if it were a checkpoint.

    What had to be adapted, such as positions for another image size, is said on stderr.

    Args:
      path: a file that `models.load_weights` reads.
      info: what the data says of itself: its classes are the model's, unless the file says others (`classes_of`).
      which: of several sets of weights in the file, `"raw"` or `"ema"`; None where there is one.
      average: take the moving average where there are several.

    Returns:
      What `training.checkpoints.checkpoint.restore_for_eval` returns, with step 0, averages that are the parameters
      where these are averages, and an empty configuration.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file cannot be read, holds several sets of weights, or does not fit the model.
    """

    def model_for(info: data.Info) -> nnx.Module:
        return abstract_model(tasks.create(config, info))[0]

    model = model_for(info)
    try:
        found = read(model, path, which, choice="--{}")
    except ValueError:
        if not average:
            raise
        found = read(model, path, EMA)
    theirs = classes_of(found, model, info)
    if theirs.num_classes != info.num_classes:
        model = model_for(theirs)
    info = theirs
    params, model_state, notes = models.convert_weights(model, found)
    say(path, notes)
    return {
        "params": params,
        "model_state": model_state,
        "ema": {"params": params, "model_state": model_state} if found.kind == EMA else None,
        "config": {},
        "step": 0,
        "metadata": {"info": dataclasses.asdict(info)},
        "path": path,
    }


def classes_of(found: Weights, model: nnx.Module, info: data.Info) -> data.Info:
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


def start_from(
    config: Config,
    params: Mapping[str, jax.Array],
    model_state: Mapping[str, jax.Array],
    model: nnx.Module,
    info: data.Info,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Starts a fresh model from saved weights or from a file of official ones.

    What the model can adapt (a classifier for another number of classes, positions of another image size) is adapted
    and said on stderr, as is which of several weights are taken; everything else has to fit. Where one part of a model
    is of a family and the model is not, as the backbone of a detector, weights of that family go to this part.

    Args:
      config: its `model.init_from` is a workdir, checkpoint or file of weights, of which `model.init_weights` are
        taken.
      params, model_state: the fresh ones.
      model: knows what may be adapted.
      info: what the data says of itself; a classifier for the same classes in another order is put in this one, and
        one for other classes starts anew.

    Returns:
      Parameters and model state in the layout of the fresh ones, whole and on the host in every process.
    """
    path, which = config.model.init_from, config.model.init_weights
    fresh, fresh_state = mesh.gather((dict(params), dict(model_state)))
    where = f"config.model.init_from={path}"
    own = models.merge(models.split(model)[0], fresh, fresh_state)
    part = _only_known_part(own)
    try:
        if files.is_weight_file(path):
            own = getattr(own, part, own)
            found = read(own, path, None if which == AUTO else which, choice="config.model.init_weights={}")
            loaded, loaded_state, notes = models.convert_weights(own, found)
            theirs = classes_of(found, own, info)
        else:
            saved = checkpoint.restore_for_eval(path)
            if which == EMA and not saved["ema"]:
                raise ValueError("config.model.init_weights=ema: it has no moving average (the run had optim.ema=0)")
            loaded, loaded_state = weights(saved, which != RAW)
            if any(name.startswith(f"{part}.") for name in loaded):  # of a model that has the part as well
                part = ""
            own = getattr(own, part, own)
            trained = configs.from_dict(saved["config"])
            before = inputs.sides(trained)
            loaded, notes = models.adapt(own, loaded, models.unstack(models.split(own)[1]), image_size=before)
            if saved["ema"]:
                taken, other = ("raw", "averaged") if which == RAW else ("averaged", "raw")
                notes = [f"the {taken} weights are taken, not the {other} ones", *notes]
            theirs = saved_info(saved)
            notes += _other_inputs(trained, config)
        loaded, said = _classes_by_name(loaded, models.unstack(models.split(own)[1]), theirs, info)
        notes += said
        if part:
            loaded, loaded_state = (
                {**models.unstack(rest), **{f"{part}.{name}": value for name, value in flat.items()}}
                for flat, rest in ((loaded, fresh), (loaded_state, fresh_state))
            )
            notes.append(f"the weights go to {part}; the rest starts anew")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    fitted = fit(loaded, fresh, where), fit(loaded_state, fresh_state, where)
    say(f"init_from {path}", notes)
    return fitted


def _only_known_part(model: nnx.Module) -> str:
    """The one attribute of a model without a family that is a model of a family; "" without or with several."""

    def known(module: Any) -> bool:
        return any(isinstance(module, family.model) for family in FAMILIES.values())

    parts = [] if known(model) else [name for name, value in vars(model).items() if known(value)]
    return parts[0] if len(parts) == 1 else ""


def _other_inputs(theirs: Config, ours: Config) -> list[str]:
    scales = [inputs.scale(config, "train_transforms") for config in (theirs, ours)]
    if scales[0] is None or scales[1] is None or inputs.rescaled(scales[0], scales[1]) is None:
        return []
    return [f"it was trained on images with {inputs.spelled(scales[0])}; here they have {inputs.spelled(scales[1])}"]


def _classes_by_name(
    loaded: Mapping[str, np.ndarray], fresh: Mapping[str, Any], theirs: data.Info, ours: data.Info
) -> tuple[dict[str, np.ndarray], list[str]]:
    """A classifier for as many classes, in the order of ours; for other classes it takes its `fresh` values."""
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


def say(what: str, notes: Iterable[str]) -> None:
    """Sentences about weights that were read, on stderr of the first process."""
    if jax.process_index() == 0:
        for note in notes:
            print(f"{what}: {note}", file=sys.stderr)
