"""MNIST's file format, "IDX": the sets that are distributed in it, such as MNIST, Fashion-MNIST and KMNIST."""

import gzip
import struct
from pathlib import Path

import numpy as np

from data.folder import find_folder
from data.source import ArraySource, Source
from data.split import select

FILES = {"train": "train", "test": "t10k"}
"""What the names of a split's two files begin with."""
_UNSIGNED_BYTE = 8


def open_idx(argument: str, split: str, directory: str | None = None) -> Source:
    """`idx:PATH`: the four files `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-...` in PATH, each as it
    is or with `.gz`. Images are uint8 [H, W, 1]; all are kept in memory.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: a file is not what its name says.
    """
    root = find_folder("idx", argument, directory)
    labels = {name: _read(root, f"{first}-labels-idx1-ubyte", 1) for name, first in FILES.items()}
    sizes = {name: len(values) for name, values in labels.items()}
    classes = max(int(values.max()) + 1 if len(values) else 0 for values in labels.values())

    def whole(name: str) -> Source:
        images = _read(root, f"{FILES[name]}-images-idx3-ubyte", 3)
        if len(images) != sizes[name]:
            raise ValueError(f"{root} has {len(images)} images but {sizes[name]} labels for {name}")
        return ArraySource(
            {"image": images[..., None], "label": labels[name].astype(np.int64)},
            fields={"image": "image", "label": "label"},
            name=f"idx:{root}",
            split=name,
            num_classes=classes,
            splits=sizes,
        )

    return select(split, sizes, whole)


def _read(root: Path, name: str, rank: int) -> np.ndarray:
    """The array of bytes in a file: two zeros, the type, the rank, every side as 4 bytes big-endian, the values."""
    path = next((path for path in (root / name, root / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{root} has neither {name} nor {name}.gz")
    try:
        content = path.read_bytes() if path.suffix != ".gz" else gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise ValueError(f"cannot unpack {path}: {error}") from error
    start = 4 + 4 * rank
    if len(content) < start or content[:4] != bytes((0, 0, _UNSIGNED_BYTE, rank)):
        raise ValueError(f"{path} does not begin as an IDX file of bytes with {rank} axes does")
    shape = struct.unpack(f">{rank}I", content[4:start])
    values = np.frombuffer(content, np.uint8, offset=start)
    if values.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path} holds {values.size} bytes but says that its shape is {shape}")
    return values.reshape(shape)
