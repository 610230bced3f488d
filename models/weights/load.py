"""Official weights into a model and out of it."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.core.errors import unknown_name
from models.core.state import Flat, split, stack, unrolled, unstack
from models.weights import files, hub, report
from models.weights.adapt import STEPS, classes_of
from models.weights.family import family_of
from models.weights.files import Weights, write_safetensors
from models.weights.preprocessing import Preprocessing
from models.weights.table import Reading
from models.weights.wrappings import WHICH

Source = str | os.PathLike[str] | Mapping[str, Any] | Weights


def load_weights(
    model: nnx.Module,
    source: Source,
    which: str | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    download: bool = False,
) -> list[str]:
    """Reads official weights into a model, in place.

    The names may be those of any dialect of the model's family (`docs/weights.md`). Arrays keep their dtype and
    sharding here; a model whose leaves are shapes gets NumPy arrays.

    Args:
      model: changed only if everything fits.
      source: a file (safetensors, `.npz`, `.pth`, `.pt`, `.bin`), a folder of Hugging Face, the name of one at its
        Hub, or a mapping of names to arrays.
      which: of several sets of weights in it, `"raw"` or `"ema"` (the moving average), or the key of one; None where
        there is one.
      folder: where a name is looked for, in place of the Hugging Face cache.
      download: a name that is not there is fetched, with `huggingface_hub`; nothing is without it.

    Returns:
      One sentence for each adaptation (a classifier that starts anew, positions that were resampled ...), and which
      weights of a training checkpoint were taken.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file cannot be read, holds several sets of weights, NaN or infinity, or does not fit the model
        (`models.weights.report.Misfit`, whose `report` lists everything); one line.
    """
    params, state, notes = convert_weights(model, source, which, folder=folder, download=download)
    _, own_params, own_state = split(model)
    own = {**own_params, **own_state}
    loaded = {**stack(params, like=own_params), **stack(state, like=own_state)}
    placed = {
        name: jax.device_put(value, own[name].sharding) if isinstance(own[name], jax.Array) else value
        for name, value in loaded.items()
    }
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model))]
    nnx.update(model, nnx.from_flat_state({path: placed[".".join(map(str, path))] for path in paths}))
    return notes


def convert_weights(
    model: nnx.Module, source: Source, which: str | None = None, **found: Any
) -> tuple[Flat, Flat, list[str]]:
    """Official weights as flat dictionaries with unrolled names, for code that holds no model.

    Args:
      model: says what is needed; it is not changed. Where a classifier starts anew, its own values are taken.
      source, which: see `load_weights`; or what `read` returned.
      found: `folder` and `download`, as there.

    Returns:
      `(params, state, notes)`: NumPy arrays by unrolled name in the model's dtypes, and sentences as in `load_weights`.

    Raises:
      FileNotFoundError, ValueError: see `load_weights`.
    """
    weights = read(model, source, which, **found)
    where = f"{weights.source}: " if weights.source else ""
    fitted = _fit(model, weights)
    if fitted.differences:
        raise report.misfit(fitted.differences, weights.arrays, model, where)
    if fitted.not_finite:
        raise ValueError(where + fitted.not_finite)
    _, params, state = split(model)
    parts = (unrolled(params), unrolled(state))
    new_params, new_state = ({name: fitted.loaded[name] for name in part} for part in parts)
    return new_params, new_state, fitted.notes


def compare_weights(model: nnx.Module, source: Source, which: str | None = None, **found: Any) -> str:
    """All that differs between a source of weights and a model, as text of several lines; `fits` and what would be
    adapted where nothing does.

    Args:
      model, source, which, found: see `convert_weights`; nothing is changed.

    Raises:
      FileNotFoundError, ValueError: the source cannot be read.
    """
    weights = read(model, source, which, **found)
    fitted = _fit(model, weights)
    if fitted.differences:
        looks, _ = report.looks_like(weights.arrays, model)
        return "\n".join(filter(None, [report.text(fitted.differences, looks), fitted.not_finite]))
    return fitted.not_finite or "\n".join(["fits", *fitted.notes])


def read(
    model: nnx.Module,
    source: Source,
    which: str | None = None,
    *,
    choice: str = WHICH,
    folder: str | os.PathLike[str] | None = None,
    download: bool = False,
) -> Weights:
    """The arrays of a source without what training scripts put around them, as `convert_weights` takes them.

    Args:
      model: its names are no wrappings.
      source, which, folder, download: see `load_weights`.
      choice: how the user says `which`, for messages: `"--{}"`.

    Raises:
      FileNotFoundError, ValueError: see `load_weights`.
    """
    family = family_of(model)
    if isinstance(source, Weights):
        return source
    table = family.layouts["torch"](model) if "torch" in family.layouts else None
    options: dict[str, Any] = {"knows": table.knows if table else lambda name: False, "choice": choice}
    if isinstance(source, Mapping):
        return files.read(source, which, **options)
    found = hub.find(source, folder, download)
    parts = [files.read(file, which, **options) for file in found.files]
    whole = dataclasses.replace(parts[0], config=found.config)
    whole.notes[:0] = [found.note] if found.note else []
    for part in parts[1:]:
        whole.arrays.update(part.arrays)
    return whole


@dataclasses.dataclass(frozen=True)
class _Fitted:
    """Weights by our unrolled names, and what is to be said: notes, what does not fit, and what is no number."""

    loaded: dict[str, np.ndarray]
    notes: list[str]
    differences: report.Differences
    not_finite: str


def classifier_classes(model: nnx.Module, weights: Weights) -> int:
    """The number of classes of the classifier in a file of weights; 0 without one.

    Args:
      model: of the same family, with any number of classes.
    """
    return classes_of(_read_names(model, weights)[2].arrays, "head")


def _read_names(model: nnx.Module, weights: Weights) -> tuple[Flat, list[str], Reading]:
    """The model's own leaves by unrolled name, what is to be said, and the file's by these names."""
    family = family_of(model)
    _, params, state = split(model)
    own = unrolled({**params, **state})
    found = family.translate(weights.arrays, model)
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    reading = family.layouts[found.layout](model).read(found.arrays, shapes)
    return own, [*weights.notes, *found.notes], reading


def _fit(model: nnx.Module, weights: Weights) -> _Fitted:
    own, notes, reading = _read_names(model, weights)
    typed, problems = _typed(reading.arrays, own), reading.problems
    said, wrong = _unlike_config(model, weights.config)
    notes += said
    problems += wrong
    loaded = typed
    for step in STEPS:
        try:
            loaded, said = step(model, loaded, own)
            notes += said
        except ValueError as error:
            problems.append(str(error))
    taken = {name: array for name, array in typed.items() if name in own and name in loaded}
    not_finite = _not_finite(taken, loaded, reading)
    return _Fitted(loaded, notes, report.differences(loaded, own, reading, problems), not_finite)


_UNSEEN = ("activation", "norm_eps", "pad_first", "heads")
"""Options that change a function and that no array shows."""


def _unlike_config(model: nnx.Module, config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Notes on what a `config.json` says of the function and the model does otherwise; and what makes it another one,
    though the arrays fit.
    """
    keys = family_of(model).configs.get(str(config.get("model_type", "")))
    if keys is None:
        return [], []
    try:
        said = keys.read(config)
    except ValueError as error:
        return [f"config.json is not compared with the model: {error}"], []
    own: Any = getattr(model, "options", None)
    other = {
        option: f"{option}={value!r} in config.json, {getattr(own, option)!r} in the model"
        for option, value in said.items()
        if option in _UNSEEN and getattr(own, option, value) != value
    }
    wrong = [other.pop("heads")] if "heads" in other else []
    return list(other.values()), wrong


def export_weights(
    model: nnx.Module,
    path: str | os.PathLike[str] | None = None,
    *,
    layout: str = "torch",
    class_names: Sequence[str] = (),
    preprocessing: Preprocessing | None = None,
) -> dict[str, np.ndarray]:
    """A model's weights by official names and in official layouts, the inverse of `load_weights`.

    Args:
      path: also writes them there, as safetensors.
      layout: `"torch"`, the official PyTorch names, or another layout of the family (`"big_vision"` for ViT).
      class_names: of the classifier, noted in the file.
      preprocessing: what images go through, noted in the file.

    Raises:
      ValueError: the model has no table, one that cannot be inverted, or shapes only.
      OSError: the file cannot be written.
    """
    family = family_of(model)
    if layout not in family.layouts:
        raise ValueError(unknown_name(f"layout of family {family.name!r}", layout, family.layouts))
    _, params, state = split(model)
    leaves = {**params, **state}
    if abstract := [name for name, value in leaves.items() if isinstance(value, jax.ShapeDtypeStruct)]:
        raise ValueError(f"a model without weights cannot be exported: {abstract[0]} is only a shape")
    flat = {name: np.asarray(value) for name, value in leaves.items()}
    arrays = family.layouts[layout](model).write(unstack(flat))
    if path is not None:
        write_safetensors(path, arrays, class_names, preprocessing)
    return arrays


def _typed(loaded: Mapping[str, np.ndarray], own: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """In the model's dtypes, floating point from floating point and integers from integers."""

    def alike(a: Any, b: Any) -> bool:
        return any(jnp.issubdtype(a, kind) and jnp.issubdtype(b, kind) for kind in (jnp.floating, jnp.integer))

    with np.errstate(over="ignore"):  # what becomes infinite is said
        return {
            name: value.astype(own[name].dtype) if name in own and alike(value.dtype, own[name].dtype) else value
            for name, value in loaded.items()
        }


def _not_finite(taken: Mapping[str, np.ndarray], loaded: Mapping[str, np.ndarray], reading: Reading) -> str:
    """One sentence if floats of the file are NaN or infinite, or become so in the model's type.

    Args:
      taken: arrays of the file in the model's types.
      loaded: what the model would get.
    """

    def finite(value: np.ndarray) -> bool:
        return not jnp.issubdtype(value.dtype, jnp.inexact) or bool(np.isfinite(value).all())

    # A classifier that starts anew is not the file's.
    wrong = [name for name, array in taken.items() if not (finite(array) or finite(loaded[name]))]
    if not wrong:
        return ""
    what = "NaN or infinity"
    if finite(reading.arrays[wrong[0]]):
        what = f"numbers that {taken[wrong[0]].dtype} cannot hold"
    first = " + ".join(reading.origin.get(wrong[0], wrong[:1]))
    return f"{first} holds {what}" + (f" ({len(wrong)} arrays do)" if wrong[1:] else "")
