"""Sets prepared by TensorFlow Datasets as ArrayRecord files, read without TensorFlow; the digits prepare themselves."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from data.cache import cache_directory, exclusive
from data.kinds import FieldSpec
from data.source import ArraySource, EncodedImage, Info, Record, Source
from data.split import select
from naming import unknown

OUR_SETS = {"cifar10": "", "cifar100": "", "imagenet2012": " --manual_dir=DIR"}
"""Sets that shipped configurations use, and what `tfds build` needs for them besides: DIR has the files that one has to
fetch oneself.
"""
NEW = ", and docs/data.md for preparing one"


def open_digits(argument: str, split: str, directory: str | None = None) -> Source:
    """scikit-learn's digits, prepared on first use (under a second), then decoded once and kept in memory."""
    if argument:
        raise ValueError(f"the digits take no argument, got {argument!r}")
    home = Path(directory) if directory else cache_directory()
    prepared = home / "digits" / "1.0.0"
    if not prepared.exists():
        with exclusive(home, "digits"):
            if not prepared.exists():
                _prepare_digits(prepared)
    builder = _builder(prepared)
    sizes = {name: info.num_examples for name, info in builder.info.splits.items()}
    return select(split, sizes, lambda name: _in_memory(Prepared(builder, name, sizes)))


def open_tfds(name: str, split: str, directory: str | None = None, others: tuple[str, ...] = ()) -> Source:
    """Any set prepared as ArrayRecord: `name`, `name/config`, `name:version` or `name/config:version`.

    `directory` is the TFDS data directory; without one, $TFDS_DATA_DIR or ~/tensorflow_datasets. `others` are names
    that the message for an unknown one lists too.
    """
    home = Path(directory or os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets").expanduser()
    builder = _builder(_find(name, home, others))
    formats = sorted(file_format.value for file_format in builder.info.available_file_formats())
    if "array_record" not in formats:
        raise ValueError(f"{name!r} in {home} is prepared as {', '.join(formats)}; prepare it as array_record")
    sizes = {key: info.num_examples for key, info in builder.info.splits.items()}
    return select(split, sizes, lambda key: Prepared(builder, key, sizes))


class Prepared(Source):
    """One split of a prepared set. Fields: Image (image), ClassLabel (label), LabeledImage (mask), Text (text)."""

    def __init__(self, builder: Any, split: str, sizes: dict[str, int]):
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.decode import DeserializeMethod

        features: dict[str, Any] = dict(builder.info.features.items())
        kinds = {name: kind for name, feature in features.items() if (kind := _kind(feature, tfds.features))}
        self._modes = {
            name: "L" if features[name].shape[-1] == 1 else "RGB" for name, kind in kinds.items() if kind == "image"
        }
        self._floats = {
            name for name, kind in kinds.items() if kind == "image" and features[name].np_dtype == np.float32
        }
        # Only these features are parsed, and images stay compressed until a transform needs their pixels.
        self._features = tfds.features.FeaturesDict({name: features[name] for name in kinds})
        self._decoders = {name: tfds.decode.SkipDecoding() for name, kind in kinds.items() if kind in ("image", "mask")}
        self._data = builder.as_data_source(split, deserialize_method=DeserializeMethod.RAW_BYTES)
        label = features["label"] if kinds.get("label") == "label" else None
        self._file = "file_name" if "file_name" in kinds else None
        self.info = Info(
            name=builder.info.full_name,
            split=split,
            fields={name: _spec(features[name], kind) for name, kind in kinds.items() if name != self._file},
            num_examples=sizes[split],
            num_classes=label.num_classes if label else None,
            class_names=tuple(label.names or ()) if label else (),
            splits=sizes,
        )

    def __len__(self) -> int:
        return self.info.num_examples

    def __getitem__(self, index: int) -> Record:
        raw = self._read(index)
        where = self._name(index, raw)
        record: Record = {"index": index}
        for name, kind in self.info.kinds.items():
            if name in self._floats:
                # TFDS keeps a float32 as the four channels of a PNG.
                channels = np.asarray(EncodedImage(raw[name], where, "RGBA"))
                record[name] = np.ascontiguousarray(channels).view(np.float32)
            elif kind == "image":
                record[name] = EncodedImage(raw[name], where, self._modes[name])
            elif kind == "mask":
                record[name] = EncodedImage(raw[name], where).integers()
            else:
                record[name] = raw[name].decode() if kind == "text" else raw[name]
        return record

    @override
    def describe(self, index: int) -> str:
        return self._name(index, self._read(index))

    def _read(self, index: int) -> dict[str, Any]:
        return self._features.deserialize_example_np(self._data[index], decoders=self._decoders)

    def _name(self, index: int, raw: dict[str, Any]) -> str:
        file = f" ({raw[self._file].decode()})" if self._file else ""
        return f"record {index} of {self.info.name} {self.info.split}{file}"


def _kind(feature: Any, features: Any) -> str | None:
    """The field kind of a TFDS feature, None for one that has no counterpart (it is not read)."""
    if isinstance(feature, features.LabeledImage):
        return "mask"
    if isinstance(feature, features.Image):
        return "image"
    if isinstance(feature, features.ClassLabel):
        return "label"
    return "text" if isinstance(feature, features.Text) else None


def _spec(feature: Any, kind: str) -> FieldSpec:
    """What is known of the values that `Prepared` gives for a feature."""
    if kind in ("label", "text"):
        return FieldSpec(kind, (), "int64") if kind == "label" else FieldSpec(kind)
    height, width, channels = feature.shape
    if kind == "mask":
        return FieldSpec(kind, (height, width), "uint8" if feature.np_dtype == np.uint8 else None)
    # Images of 8 and 16 bits are read as grey or in colour, 8 bits each.
    dtype = "float32" if feature.np_dtype == np.float32 else "uint8"
    return FieldSpec(kind, (height, width, 1 if channels == 1 else 3), dtype)


def _builder(path: Path) -> Any:
    import tensorflow_datasets as tfds  # half a second, and not needed by the other sources

    return tfds.builder_from_directory(path)


def _find(name: str, home: Path, others: tuple[str, ...]) -> Path:
    """The folder home/name[/config]/version that holds a prepared set; the newest version unless one is asked for."""
    wanted, _, version = name.partition(":")
    found: dict[str, list[Path]] = {}
    for pattern in ("*/*/features.json", "*/*/*/features.json"):
        for file in home.glob(pattern):
            found.setdefault(file.parent.parent.relative_to(home).as_posix(), []).append(file.parent)
    if wanted not in found:
        configs = [key for key in found if key.startswith(wanted + "/")]
        if len(configs) != 1:
            if not configs and wanted in OUR_SETS:
                raise FileNotFoundError(
                    f"{wanted!r} is not prepared in {home} (see data.directory): `tfds build {wanted} "
                    f"--file_format=array_record{OUR_SETS[wanted]}` does it once, in an environment with the extra "
                    f"`prepare` (docs/data.md)"
                )
            known = configs or [*found, *others]
            raise FileNotFoundError(f"{unknown('data set', wanted, known)} (looked in {home}; see data.directory{NEW})")
        wanted = configs[0]
    versions = {path.name: path for path in found[wanted]}
    if version and version not in versions:
        raise FileNotFoundError(unknown(f"version of {wanted}", version, versions))
    newest = max(versions, key=lambda text: [int(part) if part.isdigit() else -1 for part in text.split(".")])
    return versions[version or newest]


def _in_memory(source: Source) -> ArraySource:
    records = [source[index] for index in range(len(source))]
    columns = {name: np.stack([np.asarray(record[name]) for record in records]) for name in source.info.fields}
    info = source.info
    return ArraySource(
        columns, fields=info.fields, name=info.name, split=info.split, class_names=info.class_names, splits=info.splits
    )


def _prepare_digits(prepared: Path) -> None:
    """Writes the set beside its place and moves it there whole, so that nobody ever sees half of it."""
    import tensorflow_datasets as tfds

    from data.digits.digits_dataset_builder import Builder

    prepared.parent.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.mkdtemp(prefix=".preparing-", dir=prepared.parent)
    try:
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
            builder = Builder(data_dir=scratch)
            builder.download_and_prepare(file_format=tfds.core.FileFormat.ARRAY_RECORD)
        os.rename(builder.data_path, prepared)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
