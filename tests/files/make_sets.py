"""Writes the sets of tests/files/sets with the projects whose formats they are in. Run by hand, in an environment with

    pip install datasets==5.2.0 webdataset==1.0.2 pillow
    python tests/files/make_sets.py tests/files/sets

Example n has random pixels of seed n, the class n modulo 3 and the text "number n"; what is held out counts from 100.
"""

import io
import sys
from pathlib import Path

import numpy as np
import webdataset
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Sequence, Value
from PIL import Image as Pillow

OUT = Path(sys.argv[1])
FEATURES = Features(
    {
        "img": Image(),
        "kind": ClassLabel(names=["apple", "bear", "cat"]),
        "caption": Value("string"),
        "size": Sequence(Value("int64")),
    }
)


def pixels(n):
    return np.random.default_rng(n).integers(0, 255, (6 + n % 3, 8, 3), dtype=np.uint8)


def png(n):
    buffer = io.BytesIO()
    Pillow.fromarray(pixels(n)).save(buffer, "PNG")
    return buffer.getvalue()


def rows(numbers):
    columns = {
        "img": [Pillow.fromarray(pixels(n)) for n in numbers],
        "kind": [n % 3 for n in numbers],
        "caption": [f"number {n}" for n in numbers],
        "size": [[8, 6 + n % 3] for n in numbers],
    }
    return Dataset.from_dict(columns, features=FEATURES)


parts = DatasetDict({"train": rows(range(5)), "validation": rows(range(100, 103))})
parts.save_to_disk(OUT / "saved", num_shards={"train": 2, "validation": 1})
(OUT / "parquet" / "data").mkdir(parents=True)
for name, part in parts.items():
    part.to_parquet(OUT / "parquet" / "data" / f"{name}-00000-of-00001.parquet")
(OUT / "tars").mkdir()
for name, numbers in (("train-000000", range(3)), ("train-000001", range(3, 5)), ("val-000000", range(100, 103))):
    with webdataset.TarWriter(str(OUT / "tars" / f"{name}.tar")) as writer:
        for n in numbers:
            writer.write({"__key__": f"part/{n:04d}", "png": png(n), "cls": n % 3, "txt": f"number {n}"})
(OUT / "tars" / "classes.txt").write_text("apple\\nbear\\ncat\\n")
