"""Official weights into a model and out of it."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.core.errors import unknown_name
from models.core.state import Flat, split, stack, unrolled_names, unstack
from models.weights.adapt import STEPS
from models.weights.family import family_of
from models.weights.files import read_weights, write_safetensors
from models.weights.table import Reading

Source = str | os.PathLike[str] | Mapping[str, Any]
_LAYER = re.compile(r"(?<=[._])\d+(?=[./])")
NESTED = ("model", "state_dict")
"""Where a mapping that holds more than weights keeps them, as DeiT's and timm's checkpoints do."""


def load_weights(model: nnx.Module, source: Source) -> list[str]:
    """Reads official weights into a model, in place.

    The names may be those of any dialect of the model's family (`docs/weights.md`). Arrays keep their dtype and
    sharding here; a model whose leaves are shapes gets NumPy arrays.

    Args:
      model: changed only if everything fits.
      source: a file (safetensors, `.npz`, `.pth`, `.pt`, `.bin`) or a mapping of names to arrays.

    Returns:
      One sentence for each adaptation: a classifier that starts anew, positions that were resampled ...

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file cannot be read, or does not fit the model; all that is missing, left over or of another shape
        in one line.
    """
    params, state, notes = convert_weights(model, source)
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


def convert_weights(model: nnx.Module, source: Source) -> tuple[Flat, Flat, list[str]]:
    """Official weights as flat dictionaries with unrolled names, for code that holds no model.

    Args:
      model: says what is needed; it is not changed. Where a classifier starts anew, its own values are taken.
      source: see `load_weights`.

    Returns:
      `(params, state, notes)`: NumPy arrays by unrolled name in the model's dtypes, and sentences as in `load_weights`.

    Raises:
      FileNotFoundError, ValueError: see `load_weights`.
    """
    family, layout = family_of(model), "torch"
    path = "" if isinstance(source, Mapping) else f"{os.fspath(source)}: "
    arrays = _flat(source) if isinstance(source, Mapping) else read_weights(source)
    _, params, state = split(model)
    own = _unrolled({**params, **state})

    notes: list[str] = []
    for dialect in family.dialects:
        if dialect.recognize(arrays.keys()):
            arrays, said = dialect.rewrite(arrays, model)
            layout = dialect.layout
            notes += [f"names of {dialect.name}", *said]
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    reading = family.layouts[layout](model).read(arrays, shapes)
    loaded, problems = _typed(reading.arrays, own), reading.problems
    for step in STEPS:
        try:
            loaded, said = step(model, loaded, own)
            notes += said
        except ValueError as error:
            problems.append(str(error))
    problems += _mismatches(loaded, own, reading)
    if problems:
        raise ValueError(f"{path}the weights do not fit the model: {'; '.join(problems)}")
    parts = (_unrolled(params), _unrolled(state))
    new_params, new_state = ({name: loaded[name] for name in part} for part in parts)
    return new_params, new_state, notes


def export_weights(
    model: nnx.Module, path: str | os.PathLike[str] | None = None, *, layout: str = "torch"
) -> dict[str, np.ndarray]:
    """A model's weights by official names and in official layouts, the inverse of `load_weights`.

    Args:
      path: also writes them there, as safetensors.
      layout: `"torch"`, the official PyTorch names, or another layout of the family (`"big_vision"` for ViT).

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
        write_safetensors(path, arrays)
    return arrays


def _flat(source: Mapping[str, Any]) -> dict[str, np.ndarray]:
    while nested := next((key for key in NESTED if isinstance(source.get(key), Mapping)), None):
        source = source[nested]
    return {name: np.asarray(value) for name, value in source.items()}


def _unrolled(flat: Mapping[str, Any]) -> dict[str, Any]:
    """By layer: shapes for what is scanned, and everything else (a classifier that may start anew) as it is."""
    result: dict[str, Any] = {}
    for name, value in flat.items():
        names = unrolled_names(name, *value.shape[:1] or (0,))
        layer = value if names == [name] else jax.ShapeDtypeStruct(value.shape[1:], value.dtype)
        result |= dict.fromkeys(names, layer)
    return result


def _typed(loaded: Mapping[str, np.ndarray], own: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """In the model's dtypes, floating point from floating point and integers from integers."""

    def alike(a: Any, b: Any) -> bool:
        return any(jnp.issubdtype(a, kind) and jnp.issubdtype(b, kind) for kind in (jnp.floating, jnp.integer))

    return {
        name: value.astype(own[name].dtype) if name in own and alike(value.dtype, own[name].dtype) else value
        for name, value in loaded.items()
    }


def _mismatches(loaded: Mapping[str, np.ndarray], own: Mapping[str, Any], reading: Reading) -> list[str]:
    """Everything that differs, grouped by kind; layers that differ alike are one entry."""

    def here(name: str) -> str:
        return f"{name} {list(own[name].shape)}"

    def there(name: str) -> str:
        return " + ".join(reading.origin.get(name, (name,)))

    missing = [f"{here(name)} (from {there(name)})" for name in own if name not in loaded]
    left = [f"{there(name)} {list(value.shape)}" for name, value in loaded.items() if name not in own] + reading.unknown
    shapes = [
        f"{name} is {list(value.shape)} in the file ({there(name)}), {list(own[name].shape)} in the model"
        for name, value in loaded.items()
        if name in own and value.shape != tuple(own[name].shape)
    ]
    types = [
        f"{name} is {value.dtype} in the file ({there(name)}), {own[name].dtype} in the model"
        for name, value in loaded.items()
        if name in own and value.dtype != own[name].dtype
    ]
    kinds = {"missing": missing, "left over": left, "of another shape": shapes, "of another type": types}
    return [f"{len(entries)} {kind}: {', '.join(_folded(entries))}" for kind, entries in kinds.items() if entries]


def _folded(entries: Sequence[str]) -> list[str]:
    """Entries that differ in the first number of their names only, as one: `blocks.{0-11}.norm1.bias [384]`."""
    groups: dict[str, list[int]] = {}
    single: dict[str, str] = {}
    for entry in entries:
        match = _LAYER.search(entry)
        number = match[0] if match else ""
        # Once in each name: a block's own number, not that of a branch inside it.
        key = " ".join(re.sub(rf"(?<=[._]){number}(?=[./])", "\0", word, count=1) for word in entry.split(" "))
        key = key if match else entry
        groups.setdefault(key, []).append(int(number or 0))
        single[key] = entry
    return [
        single[key] if len(numbers) == 1 else key.replace("\0", f"{{{_ranges(numbers)}}}")
        for key, numbers in groups.items()
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """`0-11` or `0-2,5`."""
    starts = [n for n in sorted(numbers) if n - 1 not in numbers]
    ends = [n for n in sorted(numbers) if n + 1 not in numbers]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
