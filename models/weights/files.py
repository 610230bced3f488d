"""Files of weights: safetensors, NumPy's `.npz` and PyTorch's `.pth`, read into and written from flat dictionaries."""

import dataclasses
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

import naming
from models.weights.preprocessing import Preprocessing
from models.weights.torch_pickle import read_tensors
from models.weights.wrappings import WHICH, Unwrapped, unwrap

TORCH = (".pth", ".pt", ".bin", ".pth.tar")
NOTES = "fovea"
"""The key in the header of a safetensors file whose JSON holds what we note there. It is one, as the library writes
several in any order, and the same weights shall be the same bytes.
"""
CLASS_NAMES, PREPROCESSING = "class_names", "preprocessing"
SUFFIXES = (".safetensors", ".npz", *TORCH)


def is_weight_file(path: str | os.PathLike[str]) -> bool:
    """Whether a path means a file, because there is one or by its ending, rather than a folder."""
    return Path(path).is_file() or (Path(path).name.lower().endswith(SUFFIXES) and not Path(path).is_dir())


def check(path: str | os.PathLike[str]) -> Path:
    """The path of a file that is there and ends in one of `SUFFIXES`.

    Raises:
      ValueError: it ends in something else.
      FileNotFoundError: there is none; the line names the nearest.
    """
    file = Path(path)
    if not file.name.lower().endswith(SUFFIXES):
        raise ValueError(f"{file}: not a file of weights by its name; known are {', '.join(SUFFIXES)}")
    if not file.is_file():
        raise FileNotFoundError(f"no file of weights {file}{naming.beside(file)}")
    return file


@dataclasses.dataclass(frozen=True)
class Weights:
    """Arrays by the names of the model that was saved, in the file's types; they may be read-only.

    Attributes:
      kind: `"ema"` for averages over training steps as far as names say, else `"raw"`.
      notes: sentences for the user: which of several sets was taken, and what was left out.
      source: the path; empty for a mapping.
      class_names: of the classifier, where the file says them (`write_safetensors`).
      config: what Hugging Face's `config.json` beside the file says; empty where there is none.
    """

    arrays: dict[str, np.ndarray]
    kind: str
    notes: list[str]
    source: str
    class_names: tuple[str, ...] = ()
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read(
    source: str | os.PathLike[str] | Mapping[str, Any],
    which: str | None = None,
    *,
    knows: Callable[[str], bool] = lambda name: False,
    choice: str = WHICH,
) -> Weights:
    """The weights in a file or in a mapping, without what training scripts put around them
    (`models.weights.wrappings`).

    `.pth`, `.pt` and `.bin` are PyTorch's, and nothing in them is run.

    Args:
      which, knows, choice: see `models.weights.wrappings.unwrap`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another ending, a damaged file, one that holds more than arrays, or several sets of weights of which
        `which` does not choose one; one line.
    """
    if isinstance(source, Mapping):
        found = unwrap(source, which, knows=knows, choice=choice)
        arrays = {name: _array(name, array) for name, array in found.arrays.items()}
        if not arrays:
            raise ValueError("the mapping holds no arrays")
        return Weights(arrays, found.kind, found.notes, "")
    file = check(source)
    name = file.name.lower()
    unwrapped: list[Unwrapped] = []

    def choose(tree: Any) -> dict[str, Any]:
        unwrapped.append(unwrap(tree, which, what=str(file), knows=knows, choice=choice))
        return unwrapped[0].arrays

    if name.endswith(TORCH):
        arrays = read_tensors(file, choose)
    else:
        arrays = choose(_read_npz(file) if name.endswith(".npz") else _read_safetensors(file))
        if not arrays:
            raise ValueError(f"{file}: holds no arrays")
    names = _class_names(file) if name.endswith(".safetensors") else ()
    return Weights(arrays, unwrapped[0].kind, unwrapped[0].notes, str(file), names)


def read_weights(source: str | os.PathLike[str] | Mapping[str, Any], which: str | None = None) -> dict[str, np.ndarray]:
    """Arrays of a file of weights, or of a mapping, by name: those of `read`, which see."""
    return read(source, which).arrays


def write_safetensors(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    class_names: Sequence[str] = (),
    preprocessing: Preprocessing | None = None,
) -> None:
    """Writes arrays by name as safetensors, in one piece: whoever reads the file sees the old one or the new one.

    Names of classes and what images go through are noted in the metadata of the header, as JSON under `fovea`.

    Raises:
      ValueError: an array of a type that the format does not have.
      OSError: the file cannot be written.
    """
    # The library writes an array's memory as it lies, whatever its strides.
    rows = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    notes: dict[str, Any] = {CLASS_NAMES: list(class_names)} if class_names else {}
    if preprocessing is not None:
        notes[PREPROCESSING] = preprocessing.as_json()
    try:
        safetensors.numpy.save_file(rows, path, {NOTES: json.dumps(notes)} if notes else None)
    except safetensors.SafetensorError as error:
        kind = OSError if "I/O error" in str(error) else ValueError
        raise kind(f"{path}: cannot be written as safetensors: {error}") from error


def _array(name: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (TypeError, RuntimeError, ValueError) as error:  # PyTorch's, of a type without NumPy's or with a gradient
        raise ValueError(f"{name} of the mapping cannot be read as an array: {error}") from error
    if array.dtype == object:
        raise ValueError(f"{name} of the mapping is no array, but {type(value).__name__}")
    return array


def _read_safetensors(file: Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(file)
    except (safetensors.SafetensorError, KeyError) as error:
        raise ValueError(f"{file}: cannot be read as safetensors: {error}") from error


def notes(file: Path) -> dict[str, Any]:
    """What `write_safetensors` noted in the header of a file; nothing where somebody else wrote it.

    Raises:
      ValueError: the file cannot be read.
    """
    try:
        with safetensors.safe_open(file, "np") as content:
            header = content.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file}: cannot be read as safetensors: {error}") from error
    # Files of before have names of classes under a key of their own.
    text = header.get(NOTES) or f'{{"{CLASS_NAMES}": {header.get(CLASS_NAMES) or "[]"}}}'
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _class_names(file: Path) -> tuple[str, ...]:
    names = notes(file).get(CLASS_NAMES)
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def _read_npz(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as content:
            if not isinstance(content, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array")
            arrays = {name: content[name] for name in content.files}
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise ValueError(f"{file}: cannot be read as .npz: {error}") from error
    # NumPy does not know bfloat16 and saves it as two bytes without a type.
    return {name: a.view(ml_dtypes.bfloat16) if a.dtype == np.dtype("V2") else a for name, a in arrays.items()}
