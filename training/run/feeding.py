"""This process's share of the data, as the configuration describes it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

import configs
import data
from configs import Config
from data.kinds import SHAPED_BY, SIZED, typed_by, without_size
from training.distributed import mesh


def open_source(config: Config, name: str, split: str) -> data.Source:
    """Opens a split of a set with the configuration's directory and cache, its files read as it says."""
    settings = config.data
    return data.open_source(name, split, settings.directory or None, settings.cache, data.Reading.of(settings))


def _examples(config: Config) -> dict[str, Any]:
    """How single examples are made."""
    settings = config.data
    return dict(mean=settings.mean, std=settings.std, on_error=settings.on_error)


def _work(config: Config) -> dict[str, Any]:
    """Who makes them."""
    settings = config.data
    return dict(workers=settings.workers, threads=settings.threads, prefetch=settings.prefetch)


def train_stream(
    config: Config, source: data.Source, position: int, sharding: NamedSharding | None = None
) -> data.TrainStream:
    """Training batches from a global position on: the rows that `sharding` gives to this process, or whole ones."""
    settings = config.data
    return data.train_stream(
        source,
        transforms=configs.transforms(config, "train_transforms"),
        batch_size=settings.batch_size,
        seed=config.seed,
        position=position,
        rows=_rows(sharding, settings.batch_size),
        repeats=settings.repeats,
        **_examples(config),
        **_work(config),
    )


def eval_batches(
    config: Config, source: data.Source, sharding: NamedSharding | None = None, *, endless: bool = False
) -> data.EvalBatches:
    """Every example of a set once, in order, the last batch padded; of each batch the rows of this process."""
    return data.eval_batches(source, **_evaluation(config, sharding), **_work(config), endless=endless)


def eval_pool(config: Config, sources: Sequence[data.Source], sharding: NamedSharding | None = None) -> data.EvalPool:
    """The same for several sets, evaluated one after another and again and again by the same workers.

    Raises:
      ValueError: one of them has no example, or lacks a field that a transform names.
    """
    passes = [data.eval_pass(source, **_evaluation(config, sharding)) for source in sources]
    return data.EvalPool(passes, **_work(config))


def _evaluation(config: Config, sharding: NamedSharding | None) -> dict[str, Any]:
    settings = config.data
    batch_size = config.eval.batch_size or settings.batch_size
    return dict(
        transforms=configs.transforms(config, "eval_transforms"),
        batch_size=batch_size,
        rows=_rows(sharding, batch_size),
        **_examples(config),
    )


def _rows(sharding: NamedSharding | None, batch_size: int) -> list[int] | None:
    return None if sharding is None else mesh.batch_rows(sharding, batch_size)


def check(
    config: Config, source: data.Source, spec: Mapping[str, jax.ShapeDtypeStruct], training: bool
) -> dict[str, np.ndarray]:
    """Sends one example through the transforms, so that what cannot work is said before anything is compiled or
    written. In an evaluation what has a height and a width may have others than the task says.

    Returns:
      The example as a batch of one; nothing if it cannot be read.

    Raises:
      ValueError: the transforms cannot be read, or end in something that the task cannot take.
    """
    key = "train_transforms" if training else "eval_transforms"
    settings = config.data
    pipeline = data.parse_transforms(configs.transforms(config, key), settings.mean, settings.std)
    with contextlib.suppress(data.ExampleError):  # one that cannot be read is the stream's to report or replace
        record = pipeline(source[0], source.info.kinds, np.random.default_rng(0))
        batch = {name: np.asarray(value)[None] for name, value in record.items()}
        return fields({**batch, "valid": np.ones(1, np.float32)}, spec, source, key, any_size=not training)
    return {}


def fields(
    batch: Mapping[str, np.ndarray],
    spec: Mapping[str, jax.ShapeDtypeStruct],
    source: data.Source,
    transforms_key: str,
    complete: bool = True,
    any_size: bool = False,
) -> dict[str, np.ndarray]:
    """The fields that a task takes, in its types, checked before the compiler sees them.

    Args:
      spec: names, shapes and types that the task wants.
      transforms_key: the key of `config.data` to name in an error.
      complete: whether all of them have to be there.
      any_size: whether what has a height and a width may have others.

    Raises:
      ValueError: a field is missing, or has another shape or another kind of numbers.
    """
    missing = [name for name in spec if name not in batch]
    if missing and complete:
        text = source.info.kinds.get(missing[0]) == "text"
        hint = f" (text becomes numbers by 'tokenize(length)' in config.data.{transforms_key})" if text else ""
        raise ValueError(
            f"{source.info.name!r} has no field {missing[0]!r}, which the task needs; it has "
            f"{', '.join(sorted(batch))}{hint}"
        )
    present = {name: batch[name] for name in spec if name in batch}
    for name, value in present.items():
        shape, wanted = tuple(value.shape[1:]), tuple(spec[name].shape[1:])
        kind = source.info.kinds.get(name)
        flexible = any_size and kind in SIZED and len(shape) == len(wanted)
        if shape != wanted and not (flexible and without_size(kind, shape) == without_size(kind, wanted)):
            of_size = kind is None or (kind in SIZED and without_size(kind, shape) == without_size(kind, wanted))
            hint = f"{configs.SIZE_KEY} and the transforms have to agree" if of_size else SHAPED_BY.get(kind or "", "")
            raise ValueError(
                f"field {name!r}{_of_kind(name, kind)} of {source.info.name!r} has shape {shape} after "
                f"config.data.{transforms_key}, the task takes {wanted}{f' ({hint})' if hint else ''}"
            )
        present[name] = _typed(name, kind, value, np.dtype(spec[name].dtype), source, transforms_key)
    return present


def _of_kind(name: str, kind: str | None) -> str:
    return "" if kind in (None, name) else f" ({kind})"


def _typed(
    name: str, kind: str | None, value: np.ndarray, wanted: np.dtype, source: data.Source, transforms_key: str
) -> np.ndarray:
    """The values in the type that the task takes; integers do not become fractions, nor the reverse, in silence."""
    if value.dtype == wanted:
        return value
    whole, takes_whole = (jax.numpy.issubdtype(dtype, jax.numpy.integer) for dtype in (value.dtype, wanted))
    if value.dtype != bool and whole != takes_whole:
        raise ValueError(
            f"field {name!r}{_of_kind(name, kind)} of {source.info.name!r} is {value.dtype} after "
            f"config.data.{transforms_key}, the task takes {wanted}{typed_by(kind, value, wanted)}"
        )
    if whole and takes_whole and value.size and not np.can_cast(value.dtype, wanted):
        limits = np.iinfo(wanted)
        if value.min() < limits.min or value.max() > limits.max:
            raise ValueError(
                f"field {name!r} of {source.info.name!r} has values from {value.min()} to {value.max()}, the task "
                f"takes {wanted}"
            )
    return value.astype(wanted)
