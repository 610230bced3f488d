"""Batches for training and evaluation: Grain runs the threads, worker processes and prefetching.

The unit of work is a chunk, a part of one process's share of one global batch. A chunk is made whole by one thread of
one worker from nothing but its number, so how many threads, workers or processes there are cannot change what is made.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import grain
import numpy as np

from data.names import unknown
from data.position import ON_ERROR, Loader
from data.source import Record, Source
from data.transforms import Pipeline, Statistics, parse_transforms
from data.workers import WorkerGuard

Batch = dict[str, np.ndarray]
CHUNK_EXAMPLES = 32
ENDLESS = 2**40  # batches
KEPT_MESSAGES = 20


@dataclass
class Stats:
    """What a stream met so far: examples replaced (in training) or masked (in evaluation), and the first messages."""

    replaced: int = 0
    messages: list[str] = field(default_factory=list)

    def add(self, messages: list[str]) -> None:
        """Counts some more, keeping the first 20 messages."""
        self.replaced += len(messages)
        self.messages += messages[: KEPT_MESSAGES - len(self.messages)]


@dataclass(frozen=True)
class _Share:
    """One process's share of every global batch, and how it is cut into chunks."""

    batch_size: int  # of the global batch
    rows: tuple[int, ...]  # of the global batch, ascending
    chunks: int

    def places(self, number: int) -> list[int]:
        """The places of chunk `number`, counted from the first example of the first global batch."""
        step, part = divmod(number, self.chunks)
        size = len(self.rows)
        rows = self.rows[size * part // self.chunks : size * (part + 1) // self.chunks]
        return [step * self.batch_size + row for row in rows]


@dataclass(frozen=True)
class _TrainChunk:
    """Makes chunk `number` of a process's training batches."""

    loader: Loader
    share: _Share
    position: int
    repeats: int

    def __call__(self, number: int) -> tuple[Batch, list[str]]:
        results = [self.loader.train(self.position + place, self.repeats) for place in self.share.places(number)]
        return stack([record for record, _ in results]), [problem for _, problem in results if problem]


@dataclass(frozen=True)
class _EvalChunk:
    """Makes chunk `number` of a process's evaluation batches; past the end, examples come again with `valid` 0."""

    loader: Loader
    share: _Share

    def __call__(self, number: int) -> tuple[Batch, list[str]]:
        examples = len(self.loader.source)
        records, problems = [], []
        for place in self.share.places(number):
            record, problem = self.loader.evaluation(place % examples)
            records.append({**record, "valid": np.float32(place < examples and problem is None)})
            if problem and place < examples:
                problems.append(problem)
        return stack(records), problems


class BatchIterator:
    """Batches of one process, as dicts of arrays [share of the batch, ...].

    `stats` counts examples that could not be used; `close()` ends threads and workers, and a `with` block does it too.
    """

    def __init__(
        self,
        make_chunk: Callable[[int], tuple[Batch, list[str]]],
        steps: int,
        share: _Share,
        *,
        workers: int,
        threads: int,
        prefetch: int,
    ):
        self.stats = Stats()
        self._share = share
        chunks = grain.MapDataset.range(steps * share.chunks).map(make_chunk)
        ahead = prefetch * share.chunks
        if workers:
            ahead = -(-ahead // workers)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead if threads else 0)
        dataset = chunks.to_iter_dataset(options)
        self._guard = WorkerGuard(workers) if workers else None
        if self._guard is not None:
            dataset = self._guard.spread(dataset, ahead)
        # The list is emptied on closing; also when it is dropped or at exit, where Grain's own clean-up comes too late.
        self._chunks = [iter(dataset)]
        self._finish = weakref.finalize(self, _close, self._chunks)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if not self._chunks:
            raise ValueError("this stream of batches is closed")
        chunks, parts = self._chunks[0], []
        for _ in range(self._share.chunks):
            batch, messages = self._guard.next(chunks) if self._guard else next(chunks)
            self.stats.add(messages)
            parts.append(batch)
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def close(self) -> None:
        """Ends threads and worker processes and frees what they hold; safe to call twice."""
        self._finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _close(chunks: list[grain.DatasetIterator]) -> None:
    while chunks:
        chunks.pop().close()


class TrainStream(BatchIterator):
    """An endless stream; `position` is that of the next batch, the only state there is."""

    def __init__(self, *arguments: Any, position: int, **options: Any):
        super().__init__(*arguments, **options)
        self.position = position

    def __next__(self) -> Batch:
        batch = super().__next__()
        self.position += self._share.batch_size
        return batch


class EvalBatches(BatchIterator):
    """One pass over a source; `len` is the number of batches, the same in every process."""

    def __init__(self, make_chunk: _EvalChunk, steps: int, *arguments: Any, **options: Any):
        super().__init__(make_chunk, steps, *arguments, **options)
        self._steps = steps

    def __len__(self) -> int:
        return self._steps


def train_stream(
    source: Source,
    *,
    transforms: str | Pipeline,
    batch_size: int,
    seed: int,
    position: int = 0,
    rows: Sequence[int] | None = None,
    workers: int = 0,
    threads: int = 2,
    prefetch: int = 2,
    on_error: str = "raise",
    repeats: int = 1,
    mean: Statistics = 0.5,
    std: Statistics = 0.5,
) -> TrainStream:
    """The endless shuffled stream of training batches, as a pure function of (seed, position).

    Args:
        source: what to read; see `open_source`.
        transforms: a string such as `random_resized_crop(224)|flip|normalize`, or a parsed one.
        batch_size: examples of a global batch.
        rows: of every global batch, those that this process makes, ascending; None for all.
        seed: chooses the order of every epoch and all augmentation.
        position: examples consumed before, over all epochs and processes; continues a run, on any number of processes.
        workers: worker processes of this process; 0 to work in threads only.
        threads: threads of this process, or of each worker; 0 to work when a batch is asked for.
        prefetch: batches made ahead.
        on_error: "raise" for an example that cannot be used, or "replace" it by another and count it in `stats`.
        repeats: how often each example comes, augmented anew (repeated augmentation, arXiv:1902.05509; DeiT: 3).
        mean, std: of pixel values between 0 and 1, one number or one for each channel, for `normalize`.
    """
    loader = _loader(source, transforms, seed, on_error, mean, std)
    share = _share(batch_size, rows)
    for name, value, least in (("position", position, 0), ("data.repeats", repeats, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    make = _TrainChunk(loader, share, position, repeats)
    return TrainStream(make, ENDLESS, share, workers=workers, threads=threads, prefetch=prefetch, position=position)


def eval_batches(
    source: Source,
    *,
    transforms: str | Pipeline,
    batch_size: int,
    rows: Sequence[int] | None = None,
    workers: int = 0,
    threads: int = 2,
    prefetch: int = 2,
    on_error: str = "raise",
    mean: Statistics = 0.5,
    std: Statistics = 0.5,
) -> EvalBatches:
    """Every example once, in order, for evaluation; arguments as for `train_stream`.

    Batches carry `valid` float32 [B]: 0 for what fills the last batch, and for an example that could not be used where
    `on_error` is "replace". Every process makes the same number of steps.
    """
    loader = _loader(source, transforms, 0, on_error, mean, std)
    share = _share(batch_size, rows)
    steps = -(-len(source) // batch_size)
    return EvalBatches(_EvalChunk(loader, share), steps, share, workers=workers, threads=threads, prefetch=prefetch)


def _loader(
    source: Source, transforms: str | Pipeline, seed: int, on_error: str, mean: Statistics, std: Statistics
) -> Loader:
    if on_error not in ON_ERROR:
        raise ValueError(unknown("data.on_error", on_error, ON_ERROR))
    if not len(source):
        raise ValueError(f"{source.info.name} {source.info.split} holds no example")
    pipeline = parse_transforms(transforms, mean, std) if isinstance(transforms, str) else transforms
    pipeline.kinds(source.info.fields)  # names the field of a misspelt on=
    return Loader(source, pipeline, seed, on_error)


def _share(batch_size: int, rows: Sequence[int] | None) -> _Share:
    if batch_size < 1:
        raise ValueError(f"data.batch_size must be at least 1, got {batch_size}")
    chosen = tuple(range(batch_size)) if rows is None else tuple(map(int, rows))
    if not chosen or list(chosen) != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] < batch_size:
        raise ValueError(f"rows must be distinct, ascending and in 0..{batch_size - 1}, got {chosen[:4]}...")
    return _Share(batch_size, chosen, chunks=-(-len(chosen) // CHUNK_EXAMPLES))


def stack(records: list[Record]) -> Batch:
    """One batch of records. Raises ValueError naming a field whose shape differs among them."""
    batch = {}
    for name in records[0]:
        values = [record[name] for record in records]
        shapes = {np.shape(value) for value in values}
        if len(shapes) > 1:
            some = ", ".join(str(shape) for shape in sorted(shapes)[:3])
            raise ValueError(f"field {name!r} has shapes {some} in one batch: the transforms must end in one shape")
        batch[name] = np.stack(values)
    return batch
