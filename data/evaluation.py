"""Batches for evaluation: every example of one or several sources once, in order, again and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from data.position import Loader
from data.source import Source
from data.stream import ENDLESS, Batch, Chunks, Share, Stats, joined, loader_of, share_of, stack
from data.transforms import Pipeline, Statistics

Problems = list[tuple[int, str]]  # the example, and what was wrong with it


@dataclass(frozen=True)
class EvalPass:
    """One process's batches of one pass over a source; `eval_pass` makes one.

    `steps` is their number, the same in every process, of which the last ones are filled up past `examples`.
    """

    loader: Loader
    share: Share
    examples: int
    steps: int

    @property
    def chunks(self) -> int:
        """How many pieces all batches are made in."""
        return self.steps * self.share.chunks

    def __call__(self, number: int) -> tuple[Batch, Problems]:
        """Chunk `number`; past the end, examples come again with `valid` 0."""
        records, problems = [], []
        for place in self.share.places(number):
            index = place % len(self.loader.source)
            record, problem = self.loader.evaluation(index)
            records.append({**record, "valid": np.float32(place < self.examples and problem is None)})
            if problem and place < self.examples:
                problems.append((index, problem))
        return stack(records), problems


def eval_pass(
    source: Source,
    *,
    transforms: str | Pipeline,
    batch_size: int,
    rows: Sequence[int] | None = None,
    on_error: str = "raise",
    mean: Statistics = 0.5,
    std: Statistics = 0.5,
    endless: bool = False,
) -> EvalPass:
    """A pass over a source; arguments as for `train_stream`.

    Args:
        endless: whether the first example comes again, valid, after the last one.
    """
    loader = loader_of(source, transforms, 0, on_error, mean, std)
    share = share_of(batch_size, rows)
    if endless:
        return EvalPass(loader, share, ENDLESS * batch_size, ENDLESS)
    return EvalPass(loader, share, len(source), -(-len(source) // batch_size))


@dataclass(frozen=True)
class _Rounds:
    """Chunk `number` of all passes one after another, then blanks, and so on for ever."""

    passes: tuple[EvalPass, ...]
    blanks: int
    first: int  # where in a round chunk 0 stands

    def __call__(self, number: int) -> tuple[Batch, Problems]:
        place = (self.first + number) % (sum(part.chunks for part in self.passes) + self.blanks)
        for part in self.passes:
            if place < part.chunks:
                return part(place)
            place -= part.chunks
        return {}, []


class EvalPool:
    """Threads and worker processes that make the batches of several passes, and live from one evaluation to the next.

    They work ahead in the order of the passes, which is the order to run them in; any other works, and starts them
    anew. After the last pass they make blanks, so that nothing is read or held in memory until the next round.
    """

    def __init__(self, passes: Sequence[EvalPass], *, workers: int = 0, threads: int = 2, prefetch: int = 2):
        self.passes = tuple(passes)
        self._options = {"workers": workers, "threads": threads}
        self._ahead = prefetch * max(part.share.chunks for part in passes)
        # What Grain holds at most: in a worker's threads, in its queue and in this process, each `ahead`.
        self._blanks = 3 * self._ahead + (threads + 4) * max(workers, 1)
        self._length = sum(part.chunks for part in passes) + self._blanks
        self._chunks: Chunks | None = None
        self._place = 0  # in a round, of the next chunk

    def run(self, number: int) -> EvalBatches:
        """The batches of one pass from its beginning. A pass that was not finished is given up."""
        return EvalBatches(self, number)

    def seek(self, place: int) -> None:
        """Makes the chunk at a place of a round the next one, without a new start where it is or only blanks lie
        before it.
        """
        if self._chunks is not None and place == 0 and self._place >= self._length - self._blanks:
            while self._place:
                self.next()
        if self._chunks is None or self._place != place:
            self.close()
            make = _Rounds(self.passes, self._blanks, place)
            self._chunks = Chunks(make, ENDLESS, ahead=self._ahead, **self._options)
            self._place = place

    def next(self) -> tuple[Batch, Problems]:
        """The next chunk. An error ends threads and workers; the next pass starts new ones."""
        assert self._chunks is not None
        try:
            chunk = next(self._chunks)
        except BaseException:
            self.close()
            raise
        self._place = (self._place + 1) % self._length
        return chunk

    def close(self) -> None:
        """Ends threads and worker processes and frees what they hold; safe to call twice."""
        if self._chunks is not None:
            self._chunks.close()
            self._chunks = None


class EvalBatches:
    """One pass over a source; `len` is the number of batches, the same in every process.

    `stats` counts examples that could not be used, and `left_out` says why, by the index of each.
    """

    def __init__(self, pool: EvalPool, number: int, *, own: bool = False):
        self.stats, self.left_out = Stats(), dict[int, str]()
        self._pool, self._own, self._part = pool, own, pool.passes[number]
        self._start = sum(part.chunks for part in pool.passes[:number])
        self._taken = 0
        self._closed = False

    def __len__(self) -> int:
        return self._part.steps

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("this stream of batches is closed")
        if self._taken == self._part.steps:
            if self._own:
                self._pool.close()
            raise StopIteration
        chunks, parts = self._part.share.chunks, []
        self._pool.seek(self._start + self._taken * chunks)
        for _ in range(chunks):
            batch, problems = self._pool.next()
            self.stats.add([message for _, message in problems])
            self.left_out.update(problems)
            parts.append(batch)
        self._taken += 1
        return joined(parts)

    def close(self) -> None:
        """Ends the pass; safe to call twice."""
        self._closed = True
        if self._own:
            self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


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
    endless: bool = False,
) -> EvalBatches:
    """Every example once, in order, for evaluation; arguments as for `train_stream` and `eval_pass`.

    Batches carry `valid` float32 [B]: 0 for what fills the last batch, and for an example that could not be used where
    `on_error` is "replace". Every process makes the same number of steps.
    """
    part = eval_pass(
        source,
        transforms=transforms,
        batch_size=batch_size,
        rows=rows,
        on_error=on_error,
        mean=mean,
        std=std,
        endless=endless,
    )
    return EvalBatches(EvalPool([part], workers=workers, threads=threads, prefetch=prefetch), 0, own=True)
