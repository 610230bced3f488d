"""Which example stands at a position of a stream, and with what randomness: pure functions of (seed, position)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from grain.experimental import index_shuffle

from data.kinds import PICTURES, misfit
from data.source import ExampleError, Record, Source
from data.transforms import Pipeline

ON_ERROR = ("raise", "replace")
MAX_REPLACEMENTS = 20
TABLE_EXAMPLES = 2**20  # up to here an epoch's order is a table (4 bytes an example)
_AUGMENTATION, _REPLACEMENT, _ORDER = 0, 1, 2  # what a generator is for, so that no two uses share numbers


def generator(seed: int, position: int, purpose: int = _AUGMENTATION, attempt: int = 0) -> np.random.Generator:
    """A generator for one position: Philox, each key and counter a stream of its own (Salmon et al., SC 2011)."""
    bits = np.random.Philox(key=np.array([seed, position], np.uint64), counter=[0, 0, attempt, purpose])
    return np.random.Generator(bits)


@functools.lru_cache(maxsize=4)
def _table(seed: int, epoch: int, examples: int) -> np.ndarray:
    return generator(seed, epoch, _ORDER).permutation(examples).astype(np.int32)


@functools.lru_cache(maxsize=4)
def _epoch_seed(seed: int, epoch: int) -> int:
    return int(generator(seed, epoch, _ORDER).integers(2**32))


def example_at(seed: int, position: int, examples: int, repeats: int = 1) -> int:
    """The example at a position: each epoch is another permutation, each example comes `repeats` times in a row."""
    epoch, place = divmod(position // repeats, examples)
    if examples <= TABLE_EXAMPLES:
        return int(_table(seed, epoch, examples)[place])
    # Grain's shuffle needs no memory; on small sets it takes a hundred microseconds an index.
    return int(index_shuffle(place, max_index=examples - 1, seed=_epoch_seed(seed, epoch), rounds=4))


@dataclass(frozen=True)
class Loader:
    """Makes the example at a position: reads it, checks it, transforms it, and replaces it if it cannot be used."""

    source: Source
    pipeline: Pipeline
    seed: int
    on_error: str

    def train(self, position: int, repeats: int) -> tuple[Record, str | None]:
        """The example at `position` of the training stream and, if it stands in for another, what was wrong with that.

        A replacement is drawn from all examples by (seed, position), so every run makes the same choice. Raises
        ExampleError if `on_error` is "raise", or when 20 replacements in a row fail.
        """
        index = example_at(self.seed, position, len(self.source), repeats)
        return self._load(index, position)

    def evaluation(self, index: int) -> tuple[Record, str | None]:
        """Example `index` itself, or a stand-in (to be masked) and what was wrong."""
        return self._load(index, index)

    def _load(self, index: int, position: int) -> tuple[Record, str | None]:
        problem = None
        for attempt in range(1 + MAX_REPLACEMENTS):
            try:
                record = self.source[index]
                check_record(record, self.source, index)
                rng = generator(self.seed, position, _AUGMENTATION, attempt)
                return self.pipeline(record, self.source.info.kinds, rng), problem
            except ExampleError as error:
                if self.on_error == "raise":
                    raise
                problem = problem or str(error)
            index = int(generator(self.seed, position, _REPLACEMENT, attempt).integers(len(self.source)))
        raise ExampleError(f"{MAX_REPLACEMENTS} replacements in a row failed too; the first: {problem}")


def check_record(record: Record, source: Source, index: int) -> None:
    """Raises ExampleError, naming the example, for a label out of range, a pixel, box, point or flow that is not
    finite, and a value that is none of its kind.
    """
    for name, kind in source.info.kinds.items():
        value = record[name]
        classes = source.info.num_classes
        if isinstance(value, np.ndarray) and (reason := misfit(kind, value.ndim, value.dtype)):
            raise ExampleError(f"field {name!r} of {source.describe(index)} {reason}")
        if kind == "label" and name == "label" and classes is not None:
            wrong = np.asarray(value)
            if wrong.size and not (wrong.min() >= 0 and wrong.max() < classes):
                raise ExampleError(f"label {value} of {source.describe(index)} is not in 0..{classes - 1}")
            continue
        for part in value if isinstance(value, list | tuple) else (value,):
            if not isinstance(part, np.ndarray):
                continue
            if part.dtype.kind == "f" and kind not in ("depth", "disparity") and not np.isfinite(part).all():
                raise ExampleError(f"field {name!r} of {source.describe(index)} holds NaN or infinite values")
            if kind in PICTURES and part.dtype != np.uint8 and part.size:
                low, high = part.min(), part.max()
                if part.dtype.kind != "f" or not (low >= 0 and high <= 1):
                    raise ExampleError(
                        f"image field {name!r} of {source.describe(index)} is {part.dtype} from {low:g} to {high:g}; "
                        "wanted uint8, or floats from 0 to 1: set data.pixel_range=black,white"
                    )
