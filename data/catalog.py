"""Opens a data set by its name in the config."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import naming
from data.folder import open_class_folders, open_images
from data.huggingface import open_hf
from data.idx import open_idx
from data.parquet import open_parquet
from data.pixels import Reading
from data.source import DecodedOnce, Info, ReadAs, Source
from data.synthetic import open_synthetic
from data.tar import open_tar
from data.tfds_source import open_digits, open_tfds

CACHE_POLICIES = ("auto", "memory", "none")
AUTO_CACHE_BYTES = 256 * 2**20


class Opener(Protocol):
    """Opens the part of a name after the colon."""

    def __call__(self, argument: str, split: str, directory: str | None = None) -> Source:
        """Opens `split` of the set; `directory` is where prepared sets live."""
        ...


_OPENERS: dict[str, Opener] = {
    "digits": open_digits,
    "folder": open_class_folders,
    "hf": open_hf,
    "idx": open_idx,
    "images": open_images,
    "parquet": open_parquet,
    "synthetic": open_synthetic,
    "tar": open_tar,
}


def register_source(name: str, opener: Opener) -> None:
    """Makes `name` and `name:argument` open with `opener(argument, split, directory)`; for sets made in code."""
    _OPENERS[name] = opener


def sources() -> dict[str, Opener]:
    """Every kind of set that has a name here, with its opener; what TFDS prepared has names of its own."""
    return dict(_OPENERS)


def open_source(
    name: str, split: str, directory: str | None = None, cache: str = "auto", reading: Reading | None = None
) -> Source:
    """Opens a split of a data set.

    Args:
        name: `digits`, `folder:PATH`, `images:PATH` (no labels), `hf:PATH` (saved by Hugging Face's datasets),
            `parquet:PATH`, `tar:PATH` (WebDataset's), `idx:PATH` (MNIST's files), `synthetic[:options]`, a registered
            name, `package.module:Function[:argument]` for an `Opener` of the user's, or the name of a set
            that TFDS prepared as ArrayRecord (`name`, `name/config`, `name:version`).
        split: a split or part of one, such as `train`, `train[:90%]`, `train[100:200]+test`.
        directory: where prepared sets live; None for the default of the source.
        cache: `memory` keeps decoded examples after their first use, `none` does not, `auto` does so for a set whose
            images and other arrays are known to have one shape and take less than 256 MiB.
        reading: what becomes of more than 8 bits, alpha and EXIF's rotation.

    Raises:
        FileNotFoundError: nothing by this name; the message lists what there is.
        ValueError: no such split, or a set that cannot be used.
    """
    if cache not in CACHE_POLICIES:
        raise ValueError(f"data.cache must be one of {', '.join(CACHE_POLICIES)}, got {cache!r}")
    kind, _, argument = name.partition(":")
    opener = _OPENERS.get(kind)
    outside, _, rest = argument.partition(":")
    if opener is not None:
        source = opener(argument, split, directory)
    elif naming.is_outside(f"{kind}:{outside}"):
        source = _outside(f"{kind}:{outside}")(rest, split, directory)
    else:
        source = open_tfds(name, split, directory, others=tuple(_OPENERS))
    source = source if reading in (None, Reading()) else ReadAs(source, reading or Reading())
    return DecodedOnce(source) if cache == "memory" or (cache == "auto" and _is_small(source.info)) else source


def open_files(folder: str | Path, reading: Reading | None = None) -> Source:
    """Every file below a folder that can be an example, here an image, in the order of their names, without labels.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: there is none.
    """
    return open_source(f"images:{folder}", "all", cache="none", reading=reading)


def _is_small(info: Info) -> bool:
    """Whether all examples together are known to fit into memory."""
    sizes = [spec.bytes for spec in info.fields.values() if spec.kind not in ("label", "text", "tokens")]
    known = [size for size in sizes if size is not None]
    return bool(sizes) and len(known) == len(sizes) and info.num_examples * sum(known) < AUTO_CACHE_BYTES


def _outside(name: str) -> Opener:
    try:
        opener = naming.load(name, "data.name")
    except ValueError as error:
        # What looks like a module may be a misspelt kind of set.
        raise ValueError(f"{error}{naming.hint(name.partition(':')[0], _OPENERS)}") from error
    if not callable(opener):
        raise ValueError(f"data.name={name!r}: takes a function of (argument, split, directory), this is {opener!r}")
    return opener
