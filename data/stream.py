"""Batches for training, and what those for evaluation share: Grain runs the threads, worker processes and prefetching.

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

from data.position import ON_ERROR, Loader
from data.source import Record, Source
from data.transforms import Pipeline, Statistics, parse_transforms
from data.workers import WorkerGuard, free_memory
from naming import unknown

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
class Share:
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
    share: Share
    position: int
    repeats: int

    def __call__(self, number: int) -> tuple[Batch, list[str]]:
        results = [self.loader.train(self.position + place, self.repeats) for place in self.share.places(number)]
        return stack([record for record, _ in results]), [problem for _, problem in results if problem]


class Chunks:
    """`make(0)`, `make(1)`, ... in order, made ahead by threads and worker processes until `close()` ends them."""

    def __init__(self, make: Callable[[int], tuple[Batch, Any]], count: int, *, workers: int, threads: int, ahead: int):
        chunks = grain.MapDataset.range(count).map(make)
        if workers:
            ahead = -(-ahead // workers)
        threads = min(threads, ahead)  # Grain warns of more: they would have nothing to do
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead if threads else 0)
        dataset = chunks.to_iter_dataset(options)
        self._guard = WorkerGuard(workers) if workers else None
        if self._guard is not None:
            dataset = self._guard.spread(dataset, ahead)
        # The list is emptied on closing; also when it is dropped or at exit, where Grain's own clean-up comes too late.
        self._chunks = [iter(dataset)]
        self._finish = weakref.finalize(self, _close, self._chunks)

    def __next__(self) -> tuple[Batch, Any]:
        if not self._chunks:
            raise ValueError("this stream of batches is closed")
        return self._guard.next(self._chunks[0]) if self._guard else next(self._chunks[0])

    def close(self) -> None:
        """Ends threads and worker processes and frees what they hold; safe to call twice."""
        self._finish()


def _close(chunks: list[grain.DatasetIterator]) -> None:
    while chunks:
        chunks.pop().close()
        free_memory()


class TrainStream:
    """An endless iterator over the batches of one process, as dicts of arrays [share of the batch, ...].

    `position` is that of the next batch, the only state there is; `stats` counts examples that could not be used;
    `close()` ends threads and workers, and a `with` block does it too.
    """

    def __init__(
        self, make_chunk: _TrainChunk, share: Share, *, position: int, workers: int, threads: int, prefetch: int
    ):
        self.position, self.stats, self._share = position, Stats(), share
        ahead = prefetch * share.chunks
        self._chunks = Chunks(make_chunk, ENDLESS * share.chunks, workers=workers, threads=threads, ahead=ahead)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        parts = []
        for _ in range(self._share.chunks):
            batch, messages = next(self._chunks)
            self.stats.add(messages)
            parts.append(batch)
        self.position += self._share.batch_size
        return joined(parts)

    def close(self) -> None:
        """Ends threads and worker processes and frees what they hold; safe to call twice."""
        self._chunks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


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
    loader = loader_of(source, transforms, seed, on_error, mean, std)
    share = share_of(batch_size, rows)
    for name, value, least in (("position", position, 0), ("data.repeats", repeats, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    make = _TrainChunk(loader, share, position, repeats)
    return TrainStream(make, share, workers=workers, threads=threads, prefetch=prefetch, position=position)


def loader_of(
    source: Source, transforms: str | Pipeline, seed: int, on_error: str, mean: Statistics, std: Statistics
) -> Loader:
    """What makes single examples, with its arguments checked."""
    if on_error not in ON_ERROR:
        raise ValueError(unknown("data.on_error", on_error, ON_ERROR))
    if not len(source):
        raise ValueError(f"{source.info.name} {source.info.split} holds no example")
    pipeline = parse_transforms(transforms, mean, std) if isinstance(transforms, str) else transforms
    pipeline.kinds(source.info.kinds)  # names the field of a misspelt on=
    return Loader(source, pipeline, seed, on_error)


def share_of(batch_size: int, rows: Sequence[int] | None) -> Share:
    """The rows of this process, checked."""
    if batch_size < 1:
        raise ValueError(f"data.batch_size must be at least 1, got {batch_size}")
    chosen = tuple(range(batch_size)) if rows is None else tuple(map(int, rows))
    if not chosen or list(chosen) != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] < batch_size:
        raise ValueError(f"rows must be distinct, ascending and in 0..{batch_size - 1}, got {chosen[:4]}...")
    return Share(batch_size, chosen, chunks=-(-len(chosen) // CHUNK_EXAMPLES))


def joined(parts: list[Batch]) -> Batch:
    """One batch of its chunks."""
    return parts[0] if len(parts) == 1 else {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


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
