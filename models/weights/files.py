"""Files of weights: safetensors, NumPy's `.npz` and PyTorch's `.pth`, read into and written from flat dictionaries."""

import difflib
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from models.weights.torch_pickle import read_state_dict

TORCH = (".pth", ".pt", ".bin", ".pth.tar")
SUFFIXES = (".safetensors", ".npz", *TORCH)
_WRAPPED = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before every name


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
        beside = [other.name for other in file.parent.iterdir()] if file.parent.is_dir() else []
        near = "".join(f"; nearest: {file.parent / name}" for name in difflib.get_close_matches(file.name, beside, n=1))
        raise FileNotFoundError(f"no file of weights {file}{near}")
    return file


def read_weights(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Arrays of a file of weights by the names in it.

    `.pth`, `.pt` and `.bin` are PyTorch's: the state dict is taken out of a training checkpoint, averaged weights where
    there are any (`models.weights.torch_pickle.WRAPPERS`), and nothing in the file is run. `module.` before every name
    goes away. Types stay as they are, bfloat16 included; arrays may be read-only.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another ending, a damaged file, or one that holds more than arrays; one line.
    """
    file = check(path)
    name = file.name.lower()
    if name.endswith(TORCH):
        arrays = read_state_dict(file)
    elif name.endswith(".npz"):
        arrays = _read_npz(file)
    else:
        try:
            arrays = safetensors.numpy.load_file(file)
        except (safetensors.SafetensorError, KeyError) as error:
            raise ValueError(f"{file}: cannot be read as safetensors: {error}") from error
    for prefix in _WRAPPED:
        if arrays and all(key.startswith(prefix) for key in arrays):
            arrays = {key.removeprefix(prefix): array for key, array in arrays.items()}
    return arrays


def write_safetensors(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays by name as safetensors, in one piece: whoever reads the file sees the old one or the new one.

    Raises:
      ValueError: an array of a type that the format does not have.
      OSError: the file cannot be written.
    """
    # The library writes an array's memory as it lies, whatever its strides.
    rows = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    try:
        safetensors.numpy.save_file(rows, path)
    except safetensors.SafetensorError as error:
        kind = OSError if "I/O error" in str(error) else ValueError
        raise kind(f"{path}: cannot be written as safetensors: {error}") from error


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
