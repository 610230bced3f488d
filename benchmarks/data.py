"""Images a second and core, stage by stage and for the whole stream.

    python -m benchmarks.data [--name photos] [--transforms "random_resized_crop(224)|flip|normalize"] [--json FILE]

`--name photos` (the default) writes 256 JPEGs of 500x375 pixels, quality 90, to a temporary folder: ImageNet's usual
size. Any other name is opened as in a config. Each stage is timed alone on the output of the one before, in one thread,
as CPU time; the whole stream is timed on the wall with 0, 1 and 2 workers, start-up apart. Prints a table and, last,
the same as JSON (`--json`: to a file).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
from data.position import generator
from data.stream import stack
from data.transforms import Example, to_pillow

PHOTO_SIZE, PHOTOS = (500, 375), 256


def write_photos(folder: Path) -> None:
    """Photographs made of formulas: smooth shapes, edges and noise, so that a JPEG of one has about 100 kB."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: PHOTO_SIZE[1], : PHOTO_SIZE[0]].astype(np.float32)
    for index in range(PHOTOS):
        waves = [np.sin(x * rng.uniform(0.01, 0.2) + y * rng.uniform(-0.2, 0.2) + rng.uniform(0, 6)) for _ in range(3)]
        edge = 60 * (x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1) > rng.uniform(-100, 300))
        pixels = 110 + 40 * np.stack(waves, -1) + edge[..., None] + rng.normal(0, 12, (*x.shape, 3))
        target = folder / "train" / f"class{index % 8}" / f"{index}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(target, quality=90)


def per_second(work: Callable[[], int], seconds: float) -> float:
    """Examples per second of CPU time of this thread; `work` returns how many it did and is called until time is up."""
    work()
    done, start, cpu = 0, time.perf_counter(), time.thread_time()
    while time.perf_counter() - start < seconds:
        done += work()
    return done / (time.thread_time() - cpu)


def decoded(record: data.Record) -> data.Record:
    return {
        name: to_pillow(np.asarray(value)) if isinstance(value, data.EncodedImage) else to_pillow(value)
        for name, value in record.items()
    }


def stages(
    source: data.Source, pipeline: data.Pipeline, batch_size: int, seconds: float
) -> Iterable[tuple[str, float]]:
    """(stage, images a second and core) for reading, decoding, every transform and batching."""
    count, kinds = min(64, len(source)), source.info.kinds
    indices = range(count)

    def read() -> int:
        for index in indices:
            for value in source[index].values():
                if isinstance(value, data.EncodedImage):
                    _ = value.size  # reads the file and its header
        return count

    yield "read", per_second(read, seconds)
    yield "read and decode", per_second(lambda: sum(1 for index in indices if decoded(source[index])), seconds)
    records = [decoded(source[index]) for index in indices]
    for transform in pipeline.transforms:

        def step(transform=transform, records=records, kinds=kinds) -> int:
            for index, record in enumerate(records):
                transform(Example(dict(record), dict(kinds)), generator(0, index))
            return len(records)

        yield type(transform).__name__, per_second(step, seconds)
        examples = [Example(dict(record), dict(kinds)) for record in records]
        for index, example in enumerate(examples):
            transform(example, generator(0, index))
        records, kinds = [example.values for example in examples], examples[0].kinds
    finished = [pipeline(source[index], source.info.kinds, generator(0, index)) for index in indices]
    batch = list(itertools.islice(itertools.cycle(finished), batch_size))
    yield "batch", per_second(lambda: len(stack(batch)["index"]), seconds)

    def whole() -> int:
        for index in indices:
            pipeline(source[index], source.info.kinds, generator(0, index))
        return count

    yield "all of one example", per_second(whole, seconds)


def streamed(
    source: data.Source, pipeline: data.Pipeline, batch_size: int, workers: int, threads: int, seconds: float
) -> tuple[float, float]:
    """(seconds to the first batch, images a second on the wall) of a training stream."""
    start = time.perf_counter()
    with data.train_stream(
        source, transforms=pipeline, batch_size=batch_size, seed=0, workers=workers, threads=threads
    ) as stream:
        next(stream)
        first = time.perf_counter() - start
        for _ in range(2 + 2 * workers):  # what was made ahead while nobody asked
            next(stream)
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            done += len(next(stream)["index"])
        return first, done / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="photos")
    parser.add_argument("--split", default="train")
    parser.add_argument("--transforms", default="random_resized_crop(224)|flip|randaugment(2, 9)|normalize|erase(0.25)")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each figure")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        name = options.name
        if name == "photos":
            write_photos(Path(folder))
            name = f"folder:{folder}"
        source = data.open_source(name, options.split)
        channels = (source.info.fields["image"].shape or (None, None, 3))[2] or 3
        pipeline = data.parse_transforms(options.transforms, (0.5,) * channels, (0.25,) * channels)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        result = {"name": options.name, "transforms": options.transforms, "cores": cores, "machine": platform.machine()}
        print(f"{options.name}: {len(source)} examples, {cores} cores\n\n| stage | images/s/core |\n|---|---|")
        result["stages"] = {}
        for stage, speed in stages(source, pipeline, options.batch_size, options.seconds):
            result["stages"][stage] = round(speed, 1)
            print(f"| {stage} | {speed:,.0f} |", flush=True)
        print("\n| stream | first batch, s | images/s |\n|---|---|---|")
        result["streams"] = {}
        for workers in options.workers:
            first, speed = streamed(source, pipeline, options.batch_size, workers, options.threads, 2 * options.seconds)
            result["streams"][f"{workers} workers"] = {"first_batch_s": round(first, 2), "images_s": round(speed, 1)}
            print(f"| {workers} workers, {options.threads} threads each | {first:.1f} | {speed:,.0f} |", flush=True)
    text = json.dumps(result)
    if options.json:
        options.json.write_text(text + "\n")
    else:
        print(f"\n{text}")


if __name__ == "__main__":
    main()
